#include "phi_residual_layernorm.h"

#include <vector>

#include "numbers.h"

namespace syntonic {
namespace {

// A parameter where there is one, else what stands for it.
double parameter(const void* data, DType acc, int64_t i, double absent) {
  return data == nullptr ? absent : load(data, acc, i);
}

}  // namespace

// Elements are computed in the accumulation type, as the kernels do; sums in double.
Status phi_residual_layernorm(Stream, const PhiResidualLayernorm& call) {
  const DType acc = accumulation(call.dtype);
  const int64_t width = call.rows.width;
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> z(width);
    for (int64_t row = 0; row < call.rows.total(); ++row) {
      const int64_t first = row * width;
      double sum = 0;
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
      const T mean = static_cast<T>(sum / width);
      double squares = 0;
      for (const T value : z) squares += (value - sum / width) * (value - sum / width);
      const T rstd = static_cast<T>(1 / std::sqrt(squares / width + call.epsilon));
      store(call.mean, acc, row, mean);
      store(call.rstd, acc, row, rstd);
      const int64_t group = row / call.rows.count * width;
      for (int64_t j = 0; j < width; ++j) {
        const T scale = static_cast<T>(parameter(call.scale, acc, group + j, 1));
        const T bias = static_cast<T>(parameter(call.bias, acc, group + j, 0));
        const T factor = scale * static_cast<T>(call.scale_factor);
        store(call.y, call.y_dtype, first + j, (z[j] - mean) * rstd * factor + bias);
      }
    }
  });
  return kSuccess;
}

Status phi_residual_layernorm_cotangent(Stream, const PhiResidualLayernormCotangent& call) {
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
      const T mean = static_cast<T>(load(call.mean, acc, row));
      const T rstd = static_cast<T>(load(call.rstd, acc, row));
      double sum = 0;
      double product = 0;
      for (int64_t j = 0; j < width; ++j) {
        const T ct = static_cast<T>(load(call.ct_y, call.y_dtype, first + j));
        const T factor = static_cast<T>(call.scale_factor);
        xhat[j] = (static_cast<T>(load(call.z, call.dtype, first + j)) - mean) * rstd;
        weighted[j] = static_cast<T>(parameter(call.scale, acc, group + j, 1)) * factor * ct;
        sum += weighted[j];
        product += static_cast<double>(weighted[j]) * xhat[j];
        d_scale[j] += static_cast<double>(factor * ct) * xhat[j];
        d_bias[j] += ct;
      }
      const T mean_weighted = static_cast<T>(sum / width);
      const T mean_product = static_cast<T>(product / width);
      for (int64_t j = 0; j < width; ++j) {
        const T ct_z = static_cast<T>(call.ct_z ? load(call.ct_z, call.dtype, first + j) : 0);
        const T dz = rstd * (weighted[j] - mean_weighted - xhat[j] * mean_product) + ct_z;
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

Status load_phi_residual_layernorm(DType) { return kSuccess; }

}  // namespace syntonic
