// Sums of squares that leave the range of their type: how that is seen, and what brings them back.
#pragma once

#include "core/reduce.cuh"

namespace syntonic {

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

// A power of two near the inverse of the largest number of a row, or of sqrt(epsilon): a row that
// is multiplied by it has squares in range. By one warp; for_each(f) calls f(x) for the numbers of
// this lane.
template <class A, class F>
__device__ A unit_of_row(A epsilon, F for_each) {
  Largest<A> largest = {sqrt(epsilon)};
  for_each([&](A x) { largest = Largest<A>::merge(largest, {x < A(0) ? -x : x}); });
  return A(1) / power_of_two(across_lanes(largest, Lanes<kWarp>{}).value);
}

// sqrt(variance + epsilon) of a row that was multiplied by a unit. Of equal numbers epsilon alone
// is left, and beside large ones its square is not.
template <class A>
__device__ A deviation_of(A variance, A epsilon, A unit) {
  return variance == A(0) ? sqrt(epsilon) * unit : sqrt(variance + epsilon * unit * unit);
}

// Whether squares may have left the range, or are NaN, of a row whose slope is a factor over the
// root of their mean.
template <class A>
__device__ bool left_range(A slope, A factor) {
  constexpr A kFar = sizeof(A) == 4 ? A(0x1p48) : A(0x1p384);
  return !(slope > factor * (1 / kFar) && slope < factor * kFar);
}

}  // namespace syntonic
