// What a layer norm knows of a row: its mean in two numbers, because the rounding of a large mean
// would show beside a small deviation, and the inverse of its deviation.
#pragma once

#include "reduce.cuh"

namespace syntonic {

// inverse = kInverse / sqrt(variance + epsilon): without the factor it would be subnormal where the
// deviation is near the largest number.
template <class A>
constexpr A kInverse = 4;
template <class A>
struct RowStatistics {
  A mean = 0;
  A low = 0;
  A inverse = 0;
};

// (x - mean - low) * inverse * factor, as a multiply-add and a sum. No rounding stands between the
// product of x and what takes most of it away, and no difference from the mean can overflow.
template <class A>
class Normaliser {
 public:
  __device__ Normaliser(const RowStatistics<A>& row, A factor)
      : slope_(row.inverse * factor),
        shift_(-row.mean * slope_),
        rest_(fma(-row.low, slope_, fma(-row.mean, slope_, -shift_))) {}

  __device__ A operator()(A x) const { return fma(x, slope_, shift_) + rest_; }
  __device__ A slope() const { return slope_; }

 private:
  A slope_;
  A shift_;
  A rest_;  // what rounding took from the shift
};

// The power of two that a number is at least, short of the ends of the range.
__device__ inline float power_of_two(float x) {
  const float inside = x > 0x1p125f ? 0x1p125f : x < 0x1p-125f ? 0x1p-125f : x;
  return __uint_as_float(__float_as_uint(inside) & 0x7f800000u);
}
__device__ inline double power_of_two(double x) {
  const double inside = x > 0x1p1020 ? 0x1p1020 : x < 0x1p-1020 ? 0x1p-1020 : x;
  return __hiloint2double(__double2hiint(inside) & 0x7ff00000, 0);
}

template <class A>
struct Largest {
  A value = 0;

  __device__ static Largest merge(const Largest& a, const Largest& b) {
    return {a.value > b.value ? a.value : b.value};
  }
};

// The statistics of a row of any range, by one warp. for_each(f) calls f(x) for the numbers of this
// lane. They are multiplied by a power of two first, near the inverse of the largest.
template <class A, class F>
__device__ RowStatistics<A> rescaled_statistics(int64_t width, A epsilon, F for_each) {
  Largest<A> largest = {sqrt(epsilon)};
  for_each([&](A x) { largest = Largest<A>::merge(largest, {x < A(0) ? -x : x}); });
  const A unit = A(1) / power_of_two(across_lanes(largest, kWarp).value);
  Sum<A> sum;
  for_each([&](A x) { sum.value += x * unit; });
  const A mean = across_lanes(sum, kWarp).value / width;
  SumPair<A> sums;
  for_each([&](A x) {
    const A deviation = x * unit - mean;
    sums.first += deviation;
    sums.second += deviation * deviation;
  });
  sums = across_lanes(sums, kWarp);
  const A low = sums.first / width;
  const A squares = sums.second - low * sums.first;
  const A variance = squares < A(0) ? A(0) : squares / width;  // NaN stays
  const A deviation = sqrt(variance + epsilon * unit * unit);
  return {mean / unit, low / unit, kInverse<A> * unit / deviation};
}

template <class A>
__device__ RowStatistics<A> statistics_of(const Moments<A>& moments, A epsilon) {
  const A mean = moments.mean();
  return {mean, (moments.pivot - mean) + moments.offset,
          kInverse<A> / sqrt(moments.variance() + epsilon)};
}

// Whether squares of deviations may have left the range, or are NaN.
template <class A>
__device__ bool left_range(const RowStatistics<A>& row) {
  constexpr A kFar = sizeof(A) == 4 ? A(0x1p48) : A(0x1p384);
  return !(row.inverse > kInverse<A> / kFar && row.inverse < kInverse<A> * kFar);
}

}  // namespace syntonic
