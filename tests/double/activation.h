// The activations, and their derivatives applied to a cotangent.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/types.h"

namespace syntonic {

template <typename T>
T sigmoid(T u) {
  return 1 / (1 + std::exp(-u));
}

// gelu and golden_gelu are x * sigmoid(u(x)); this is u. 1 + tanh(v) = 2 sigmoid(2v).
template <typename T>
T gate_argument(Activation activation, T x) {
  if (activation == Activation::golden_gelu) return T(1.6180339887498948482) * x;
  return T(1.5957691216057307118) * (x + T(0.044715) * (x * x * x));
}

template <typename T>
T gate_slope(Activation activation, T x) {
  if (activation == Activation::golden_gelu) return T(1.6180339887498948482);
  return T(1.5957691216057307118) * (1 + T(3 * 0.044715) * (x * x));
}

template <typename T>
T activate(Activation activation, T x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x > 0 || std::isnan(x) ? x : T(0);
    default:
      return x * sigmoid(gate_argument(activation, x));
  }
}

// `saved` is the value of relu, the argument of a gelu; without an activation it means nothing.
template <typename T>
T pull_back(Activation activation, T saved, T ct) {
  if (activation == Activation::none) return ct;
  if (activation == Activation::relu) return saved > 0 ? ct : T(0);
  if (!std::isfinite(saved)) return T(NAN);
  // From here on the gates are open or closed for good; x * x * x would overflow further out.
  const T x = std::clamp(saved, T(-1000), T(1000));
  const T gate = sigmoid(gate_argument(activation, x));
  return (gate + x * gate_slope(activation, x) * (gate * (1 - gate))) * ct;
}

}  // namespace syntonic
