// The RMS norm: what it measures and keeps of a row, and how it normalises by it.
#pragma once

#include "core/range.cuh"

namespace syntonic {

// x / deviation = (x / 4) * slope, with deviation = sqrt(mean of squares + epsilon). By the quarter
// no slope is subnormal.
template <class A>
struct RowSlope {
  A slope = 0;  // 4 / deviation
};

// x of a row, normalised and multiplied by a factor. Beside numbers of 16 bits the few digits of a
// subnormal slope do: there it is one product.
template <class T>
class UncentredNormaliser {
 public:
  using A = Acc<T>;

  UncentredNormaliser() = default;
  __device__ explicit UncentredNormaliser(const RowSlope<A>& row, A factor = 1)
      : slope_(row.slope * (kOne ? factor * A(0.25) : factor)) {}

  __device__ A operator()(A x) const { return kOne ? x * slope_ : x * A(0.25) * slope_; }
  // By which x is multiplied in all.
  __device__ A slope() const { return kOne ? slope_ : slope_ / 4; }

 private:
  static constexpr bool kOne = sizeof(T) == 2;

  A slope_;
};

// What of a row's gradient does not depend on ct_y but by its mean: xhat * mean(w * xhat).
template <class T>
class UncentredAcross {
 public:
  using A = Acc<T>;

  __device__ UncentredAcross(const UncentredNormaliser<T>& normal, const Sum<A>& mean)
      : normal_(normal), mean_(mean.value), by_(mean.value * normal.slope()) {}
  __device__ A operator()(A x) const {
    if constexpr (sizeof(T) == 2) return x * by_;
    return normal_(x) * mean_;
  }

 private:
  const UncentredNormaliser<T>& normal_;
  A mean_;
  A by_;
};

// What centred.cuh has for the layer norm.
template <class T_>
struct Uncentred {
  using T = T_;
  using A = Acc<T>;
  using Measure = Sum<A>;  // of squares
  using Statistics = RowSlope<A>;
  using Normal = UncentredNormaliser<T>;
  using Products = Sum<A>;  // of w * xhat
  using Across = UncentredAcross<T>;
  static constexpr bool kBias = false;
  static constexpr bool kTuned = false;

  template <int N, int K, class Present>
  __device__ static Measure measure(Packed<T, N> (&z)[K], Present present) {
    Measure squares;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A x[N];
      unpack(z[k], x);
      const uint32_t some = present(k);
      if (some != kAll<N>) hide_absent(some, x, A(0));
#pragma unroll
      for (int e = 0; e < N; ++e) squares.value += x[e] * x[e];
    }
    return squares;
  }
  __device__ static Statistics statistics(const Measure& squares, int64_t width, A epsilon) {
    return {4 / sqrt(quotient(squares.value, static_cast<A>(width)) + epsilon)};
  }
  // Of a row of any range, by one warp, as unit_of_row has it.
  template <class F>
  __device__ static Statistics rescaled(int64_t width, A epsilon, F for_each) {
    const A unit = unit_of_row(epsilon, for_each);
    Measure squares;
    for_each([&](A x) { squares.value += x * unit * (x * unit); });
    const A mean = across_lanes(squares, Lanes<kWarp>{}).value / width;
    return {4 * (unit / deviation_of(mean, epsilon, unit))};
  }

  template <int N>
  __device__ static void add(Products& sum, const A (&xhat)[N], const A (&ct)[N],
                             const A (&scale)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) sum.value += ct[e] * scale[e] * xhat[e];
  }
  template <class F>
  __device__ static void for_each(Products& sum, F f) {
    f(sum.value);
  }
};

}  // namespace syntonic
