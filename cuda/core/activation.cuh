// Activations and their derivatives in the accumulation type. Infinities and NaN come out as in
// the jnp composition of the same formula: -inf times a gate of zero is NaN, relu keeps NaN.
#pragma once

#include "core/golden.cuh"
#include "core/types.h"

namespace syntonic {

template <class A>
__device__ A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

// x * sigmoid(u), for u a function of x with derivative du.
template <class A>
__device__ A gated_slope(A x, A u, A du) {
  const A gate = sigmoid(u);
  const A bend = gate * (A(1) - gate);
  // Where the sigmoid is saturated its slope wins over any finite x * du, even one that overflows.
  return gate + (bend > A(0) ? x * du * bend : x * bend);
}

// gelu(x) = x * (1 + tanh(v)) / 2 = x * sigmoid(2 v), v = sqrt(2/pi) (x + 0.044715 x^3): the
// second form has no cancellation where the gate closes.
template <class A>
__device__ A gelu_argument(A x) {
  constexpr A kTwiceRoot = A(1.5957691216057307117597842397375L);  // 2 sqrt(2/pi)
  return kTwiceRoot * (x + A(0.044715) * (x * x * x));
}

template <class A>
__device__ A gelu_argument_slope(A x) {
  constexpr A kTwiceRoot = A(1.5957691216057307117597842397375L);
  return kTwiceRoot * (A(1) + A(3 * 0.044715) * (x * x));
}

template <class A>
__device__ A golden_gelu_value(A x) {
  return x * sigmoid(kPhi<A> * x);
}

template <class A>
__device__ A golden_gelu_slope(A x) {
  return gated_slope(x, kPhi<A> * x, kPhi<A>);
}

// All threads take the same branch.
template <class A>
__device__ A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::relu:
      return x > A(0) ? x : (x != x ? x : A(0));
    case Activation::gelu:
      return x * sigmoid(gelu_argument(x));
    case Activation::golden_gelu:
      return golden_gelu_value(x);
    case Activation::none:
      break;
  }
  return x;
}

// activation'(x) * ct, where for relu `saved` may be its value as well as its argument.
template <class A>
__device__ A pull_back(Activation activation, A saved, A ct) {
  switch (activation) {
    case Activation::relu:
      return saved > A(0) ? ct : A(0);
    case Activation::gelu:
      return gated_slope(saved, gelu_argument(saved), gelu_argument_slope(saved)) * ct;
    case Activation::golden_gelu:
      return golden_gelu_slope(saved) * ct;
    case Activation::none:
      break;
  }
  return ct;
}

}  // namespace syntonic
