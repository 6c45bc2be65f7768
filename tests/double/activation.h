#pragma once

#include <cmath>

#include "types.h"

namespace syntonic {

template <typename T>
T sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

inline constexpr double kPhi = 1.6180339887498948482;
inline constexpr double kRootTwoOverPi = 0.79788456080286535588;
inline constexpr double kCubic = 0.044715;

template <typename T>
T activate(Activation activation, T x) {
  switch (activation) {
    case Activation::relu:
      return x > 0 || std::isnan(x) ? x : T(0);
    case Activation::gelu:
      return T(0.5) * x * (1 + std::tanh(T(kRootTwoOverPi) * (x + T(kCubic) * (x * x * x))));
    case Activation::golden_gelu:
      return x * sigmoid(T(kPhi) * x);
    default:
      return x;
  }
}

// Of relu only the sign of the argument matters, and y has the same where the derivative is not 0.
template <typename T>
T slope(Activation activation, T x) {
  switch (activation) {
    case Activation::relu:
      return x > 0 ? T(1) : T(0);
    case Activation::gelu: {
      const T t = std::tanh(T(kRootTwoOverPi) * (x + T(kCubic) * (x * x * x)));
      const T inner = T(kRootTwoOverPi) * (1 + 3 * T(kCubic) * (x * x));
      return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * inner;
    }
    case Activation::golden_gelu: {
      const T s = sigmoid(T(kPhi) * x);
      return s + T(kPhi) * x * (s * (1 - s));
    }
    default:
      return T(1);
  }
}

}  // namespace syntonic
