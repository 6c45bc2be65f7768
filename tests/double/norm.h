// The norms of rows in plain C++.
#pragma once

#include <cmath>
#include <vector>

#include "numbers.h"
#include "ops/norm_rows.h"

namespace syntonic {
namespace norm {

// Of a wider range than double where there is such a type: no square leaves it. XLA has the small
// numbers of narrower types flushed, but not its.
using Wide = long double;

// A parameter where there is one, else what stands for it.
inline double parameter(const void* data, DType acc, int64_t i, double absent) {
  return data == nullptr ? absent : load(data, acc, i);
}

// What is kept of a row z of n numbers: (z / 4 + shift) * slope + rest is z, normalised. A norm
// that does not centre keeps the slope alone.
struct Statistics {
  Wide shift = 0;
  Wide slope = 0;
  Wide rest = 0;
};

template <bool kCentred>
Statistics load_statistics(const void* data, DType acc, int64_t row) {
  if (!kCentred) return {0, load(data, acc, row), 0};
  return {load(data, acc, 3 * row), load(data, acc, 3 * row + 1), load(data, acc, 3 * row + 2)};
}

template <bool kCentred>
void store_statistics(void* data, DType acc, int64_t row, const Statistics& of) {
  if (!kCentred) return store(data, acc, row, static_cast<double>(of.slope));
  store(data, acc, 3 * row, static_cast<double>(of.shift));
  store(data, acc, 3 * row + 1, static_cast<double>(of.slope));
  store(data, acc, 3 * row + 2, static_cast<double>(of.rest));
}

// Elements are computed in the accumulation type, as the kernels do; sums in double.
template <bool kCentred>
Status run(const NormRows& call) {
  const DType acc = accumulation(call.dtype);
  const int64_t width = call.rows.width;
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> z(width);
    for (int64_t row = 0; row < call.rows.total(); ++row) {
      const int64_t first = row * width;
      Wide sum = 0;
      for (int64_t j = 0; j < width; ++j) {
        const T identity = static_cast<T>(load(call.identity, call.dtype, first + j));
        const T residual =
            static_cast<T>(call.residual ? load(call.residual, call.dtype, first + j) : 0);
        const T exact = golden_sum(identity, residual, static_cast<T>(call.sum_scale),
                                   static_cast<T>(call.residual_scale));
        z[j] = static_cast<T>(stored(call.dtype, exact));
        store(call.z, call.dtype, first + j, z[j]);
        sum += z[j];
      }
      const Wide exact_mean = kCentred ? sum / width : 0;
      Wide squares = 0;
      for (const T value : z) squares += (value - exact_mean) * (value - exact_mean);
      const Wide deviation = std::sqrt(squares / width + static_cast<Wide>(call.epsilon));
      const Wide mean = static_cast<T>(exact_mean);
      store_statistics<kCentred>(call.statistics, acc, row,
                                 {mean / -4, 4 / deviation, (mean - exact_mean) / deviation});
      const int64_t group = row / call.rows.count * width;
      for (int64_t j = 0; j < width; ++j) {
        const T scale = static_cast<T>(parameter(call.scale, acc, group + j, 1));
        const T bias = static_cast<T>(parameter(call.bias, acc, group + j, 0));
        const T xhat = static_cast<T>((z[j] - exact_mean) / deviation);
        store(call.y, call.y_dtype, first + j,
              xhat * static_cast<T>(call.scale_factor) * scale + bias);
      }
    }
  });
  return kSuccess;
}

template <bool kCentred>
Status run_cotangent(const NormRowsCotangent& call) {
  const DType acc = accumulation(call.dtype);
  const int64_t width = call.rows.width;
  const int64_t rows_of_partial = call.partials > 0 ? call.rows.total() / call.partials : 1;
  spoil(call.scratch, acc, call.scratch_size);
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> xhat(width);
    std::vector<T> weighted(width);
    std::vector<double> d_scale(width);
    std::vector<double> d_bias(width);
    for (int64_t row = 0; row < call.rows.total(); ++row) {
      const int64_t first = row * width;
      const int64_t group = row / call.rows.count * width;
      const Statistics of = load_statistics<kCentred>(call.statistics, acc, row);
      double sum = 0;
      double product = 0;
      for (int64_t j = 0; j < width; ++j) {
        const T ct = static_cast<T>(load(call.ct_y, call.y_dtype, first + j));
        const T factor = static_cast<T>(call.scale_factor);
        const Wide z = load(call.z, call.dtype, first + j);
        xhat[j] = static_cast<T>((z / 4 + of.shift) * of.slope + of.rest);
        weighted[j] = static_cast<T>(parameter(call.scale, acc, group + j, 1)) * factor * ct;
        sum += weighted[j];
        product += static_cast<double>(weighted[j]) * xhat[j];
        d_scale[j] += static_cast<double>(factor * ct) * xhat[j];
        d_bias[j] += ct;
      }
      const T mean_weighted = static_cast<T>(kCentred ? sum / width : 0);
      const T mean_product = static_cast<T>(product / width);
      for (int64_t j = 0; j < width; ++j) {
        const T ct_z = static_cast<T>(call.ct_z ? load(call.ct_z, call.dtype, first + j) : 0);
        const T centred = weighted[j] - mean_weighted - xhat[j] * mean_product;
        const T dz = static_cast<T>(of.slope / 4 * centred) + ct_z;
        store(call.d_identity, call.dtype, first + j, static_cast<T>(call.identity_scale) * dz);
        store(call.d_residual, call.dtype, first + j, static_cast<T>(call.residual_scale) * dz);
      }
      if ((row + 1) % rows_of_partial != 0) continue;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t i = row / rows_of_partial * width + j;
        store(call.d_scale, acc, i, d_scale[j]);
        store(call.d_bias, acc, i, d_bias[j]);
        d_scale[j] = d_bias[j] = 0;
      }
    }
  });
  return kSuccess;
}

}  // namespace norm
}  // namespace syntonic
