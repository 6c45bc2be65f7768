// The golden ratio, correctly rounded to the accumulation type, and the residual sum.
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

// The same numbers without a branch, for kernels that do little else: there it costs more than the
// multiplications that it saves.
template <class A>
struct GoldenSum {
  A identity;
  A residual;
  A whole;

  GoldenSum(double sum_scale, double residual_scale)
      : identity(sum_scale == 1 ? A(1) : A(0.5)),
        residual(identity * static_cast<A>(residual_scale)),
        whole(static_cast<A>(sum_scale) / identity) {}

  template <int N>
  __device__ void operator()(A (&i)[N], const A (&r)[N]) const {
#pragma unroll
    for (int e = 0; e < N; ++e) i[e] = whole * fma(residual, r[e], identity * i[e]);
  }
};

}  // namespace syntonic
