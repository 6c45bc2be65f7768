// Arrays of the four dtypes, read and written through double, which holds every value of each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace syntonic {

// `value` rounded once, half to even, to `digits` significant bits, the least normal number being
// 2^least_exponent. Too large a value is left for the caller.
inline double rounded(double value, int digits, int least_exponent) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int ulp = std::max(std::ilogb(value), least_exponent) - (digits - 1);
  return std::ldexp(std::nearbyint(std::ldexp(value, -ulp)), ulp);
}

inline double from_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

inline uint16_t to_f16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const double magnitude = std::fabs(rounded(value, 11, -14));
  if (magnitude >= 65536) return sign | 0x7c00;
  if (magnitude < std::ldexp(1, -14)) return sign | static_cast<uint16_t>(magnitude * 0x1p24);
  const int exponent = std::ilogb(magnitude);
  const int fraction = static_cast<int>(std::ldexp(magnitude, 10 - exponent)) - 1024;
  return sign | static_cast<uint16_t>((exponent + 15) << 10 | fraction);
}

// bfloat16 is the upper half of a float.
inline double from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t to_bf16(double value) {
  const float exact = static_cast<float>(rounded(value, 8, -126));
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline double load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16:
      return from_f16(static_cast<const uint16_t*>(data)[i]);
    case DType::bf16:
      return from_bf16(static_cast<const uint16_t*>(data)[i]);
    case DType::f32:
      return static_cast<const float*>(data)[i];
    default:
      return static_cast<const double*>(data)[i];
  }
}

// Does nothing where the call has no such array.
inline void store(void* data, DType dtype, int64_t i, double value) {
  if (data == nullptr) return;
  switch (dtype) {
    case DType::f16:
      static_cast<uint16_t*>(data)[i] = to_f16(value);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[i] = to_bf16(value);
      break;
    case DType::f32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    default:
      static_cast<double*>(data)[i] = value;
  }
}

// `value` as it reads once it has been stored.
inline double stored(DType dtype, double value) {
  alignas(double) unsigned char item[sizeof(double)];
  store(item, dtype, 0, value);
  return load(item, dtype, 0);
}

// sum_scale * (identity + residual_scale * residual), also where the sum overflows and z does not.
template <typename T>
T golden_sum(T identity, T residual, T sum_scale, T residual_scale) {
  const T z = sum_scale * (identity + residual_scale * residual);
  if (!std::isinf(z)) return z;
  return sum_scale * identity + sum_scale * residual_scale * residual;
}

// Calls `body` with a zero of the accumulation type of `dtype`.
template <typename Body>
void in_accumulation(DType dtype, const Body& body) {
  if (accumulation(dtype) == DType::f64) {
    body(double{});
  } else {
    body(float{});
  }
}

// What the kernels leave in scratch means nothing to the caller: make that show.
inline void spoil(void* scratch, DType acc, int64_t size) {
  for (int64_t i = 0; i < size; ++i) store(scratch, acc, i, NAN);
}

}  // namespace syntonic
