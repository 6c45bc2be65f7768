// The layer norm: what it measures and keeps of a row, and how it normalises by it.
#pragma once

#include "core/range.cuh"

namespace syntonic {

// (x - mean) / deviation = (x / 4 + shift) * slope + rest, with deviation = sqrt(variance +
// epsilon). `rest` is what the rounding of the mean took: it shows where the mean is far above the
// deviation. By the quarters no difference from the mean overflows, and no slope is subnormal.
template <class A>
struct RowStatistics {
  A shift = 0;  // -mean / 4
  A slope = 0;  // 4 / deviation
  A rest = 0;
};
static_assert(sizeof(RowStatistics<float>) == kRowStatistics * sizeof(float));

// x of a row, normalised and multiplied by a factor. Beside numbers of 16 bits the rounding of the
// mean does not show: `rest` takes no register there.
template <class T>
class Normaliser {
 public:
  using A = Acc<T>;

  Normaliser() = default;
  __device__ explicit Normaliser(const RowStatistics<A>& row, A factor = 1)
      : shift_(row.shift), slope_(row.slope * factor), rest_(kRest ? row.rest * factor : A(0)) {}

  __device__ A operator()(A x) const {
    const A deviation = fma(x, A(0.25), shift_);
    return kRest ? fma(deviation, slope_, rest_) : deviation * slope_;
  }
  // By which x is multiplied in all, and what 0 becomes. x * slope() + offset() is one instruction
  // less, but where the mean is far above the deviation it is not precise, not even near 0.
  __device__ A slope() const { return slope_ / 4; }
  __device__ A offset() const { return shift_ * slope_; }

  static constexpr bool kRest = sizeof(T) > 2;

 private:
  A shift_;
  A slope_;
  A rest_;
};

// The statistics of a row of any range, by one warp, as unit_of_row has it.
template <class A, class F>
__device__ RowStatistics<A> rescaled_statistics(int64_t width, A epsilon, F for_each) {
  const A unit = unit_of_row(epsilon, for_each);
  Sum<A> sum;
  for_each([&](A x) { sum.value += x * unit; });
  const A mean = across_lanes(sum, Lanes<kWarp>{}).value / width;
  SumPair<A> sums;
  for_each([&](A x) {
    const A deviation = x * unit - mean;
    sums.first += deviation;
    sums.second += deviation * deviation;
  });
  sums = across_lanes(sums, Lanes<kWarp>{});
  const A low = sums.first / width;
  const A squares = sums.second - low * sums.first;
  const A variance = squares < A(0) ? A(0) : squares / width;  // NaN stays
  const A deviation = deviation_of(variance, epsilon, unit);
  const A total = mean + low, rest = (mean - total) + low;
  return {total / unit * A(-0.25), 4 * (unit / deviation), -rest / deviation};
}

template <class A>
__device__ RowStatistics<A> statistics_of(const Moments<A>& moments, A epsilon) {
  const A mean = moments.mean(), low = (moments.pivot - mean) + moments.offset;
  const A slope = 4 / sqrt(moments.variance() + epsilon);
  return {mean * A(-0.25), slope, low * (slope * A(-0.25))};
}

// What of a row's gradient does not depend on ct_y but by its means: mean(w) + xhat * mean(w *
// xhat). Beside results of 16 bits one multiply-add does: its second mean is the smaller, the less
// x varies.
template <class T>
class CentredAcross {
 public:
  using A = Acc<T>;
  static constexpr bool kOne = sizeof(T) == 2;

  __device__ CentredAcross(const Normaliser<T>& normal, const SumPair<A>& means)
      : normal_(normal), means_(means) {
    if constexpr (kOne) {
      by_ = means.second * normal.slope();
      at_zero_ = fma(means.second, normal.offset(), means.first);
    }
  }
  __device__ A operator()(A x) const {
    if constexpr (kOne) return fma(x, by_, at_zero_);
    return fma(normal_(x), means_.second, means_.first);
  }

 private:
  const Normaliser<T>& normal_;
  SumPair<A> means_;
  A by_ = 0;
  A at_zero_ = 0;
};

// What the kernels of a norm ask: how a row is measured, what is kept of it, how it is normalised,
// and which sums its gradient takes.
template <class T_>
struct Centred {
  using T = T_;
  using A = Acc<T>;
  using Measure = Moments<A>;
  using Statistics = RowStatistics<A>;
  using Normal = Normaliser<T>;
  using Products = SumPair<A>;  // w and w * xhat
  using Across = CentredAcross<T>;
  static constexpr bool kBias = true;
  // By tables of its own; float64 is for checks of gradients, and has the fewest kernels to build.
  static constexpr bool kTuned = sizeof(T) < 8;

  template <int N, int K, class Present>
  __device__ static Measure measure(Packed<T, N> (&z)[K], Present present) {
    return moments_of(z, present);
  }
  __device__ static Statistics statistics(const Measure& moments, int64_t, A epsilon) {
    return statistics_of(moments, epsilon);
  }
  template <class F>
  __device__ static Statistics rescaled(int64_t width, A epsilon, F for_each) {
    return rescaled_statistics<A>(width, epsilon, for_each);
  }

  // What a pack of a row adds to the sums along the row.
  template <int N>
  __device__ static void add(Products& sums, const A (&xhat)[N], const A (&ct)[N],
                             const A (&scale)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const A w = ct[e] * scale[e];
      sums.first += w;
      sums.second += w * xhat[e];
    }
  }
  // Calls f with each of the sums.
  template <class F>
  __device__ static void for_each(Products& sums, F f) {
    f(sums.first);
    f(sums.second);
  }
};

}  // namespace syntonic
