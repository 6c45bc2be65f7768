// The golden ratio, correctly rounded to the accumulation type.
#pragma once

namespace syntonic {

template <class A>
constexpr A kPhi = A(1.6180339887498948482L);

// i = sum_scale * (i + residual_scale * r) of N elements. With a sum_scale below 1 the sum may
// overflow where this does not: half of it cannot.
template <class A, int N>
__device__ void golden_sum(A (&i)[N], const A (&r)[N], A sum_scale, A residual_scale) {
  if (sum_scale == A(1)) {
#pragma unroll
    for (int e = 0; e < N; ++e) i[e] += residual_scale * r[e];
    return;
  }
  sum_scale *= 2;
  residual_scale /= 2;
#pragma unroll
  for (int e = 0; e < N; ++e) i[e] = sum_scale * (i[e] / 2 + residual_scale * r[e]);
}

}  // namespace syntonic
