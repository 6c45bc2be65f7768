// What a layer norm keeps of a row, and how it normalises by it.
#pragma once

#include "core/reduce.cuh"

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
  const A unit = A(1) / power_of_two(across_lanes(largest, Lanes<kWarp>{}).value);
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
  // Of equal numbers epsilon alone is left, and beside large ones its square is not.
  const A deviation =
      variance == A(0) ? sqrt(epsilon) * unit : sqrt(variance + epsilon * unit * unit);
  const A total = mean + low, rest = (mean - total) + low;
  return {total / unit * A(-0.25), 4 * (unit / deviation), -rest / deviation};
}

template <class A>
__device__ RowStatistics<A> statistics_of(const Moments<A>& moments, A epsilon) {
  const A mean = moments.mean(), low = (moments.pivot - mean) + moments.offset;
  const A slope = 4 / sqrt(moments.variance() + epsilon);
  return {mean * A(-0.25), slope, low * (slope * A(-0.25))};
}

// Whether squares of deviations may have left the range, or are NaN, of a row whose slope is a
// factor over the deviation.
template <class A>
__device__ bool left_range(A slope, A factor) {
  constexpr A kFar = sizeof(A) == 4 ? A(0x1p48) : A(0x1p384);
  return !(slope > factor * (1 / kFar) && slope < factor * kFar);
}

}  // namespace syntonic
