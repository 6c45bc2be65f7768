// The nearest point a + b phi with |a|, |b| <= precision: its value, or its coefficients.
#pragma once

#include "core/types.h"

namespace syntonic {

struct Crystallize {
  const void* x;  // dtype, count elements
  void* y;        // y_dtype: the value; null where the coefficients are asked for
  int32_t* a;
  int32_t* b;
  DType dtype;
  DType y_dtype;
  int64_t count;
  int32_t precision;
};
Status crystallize(Stream stream, const Crystallize& call);

Status load_crystallize(DType dtype);

// Up to this precision float finds points near the middle, and has their values to a unit in its
// last place. A float64 result takes double: its digits must not hang on the type of x.
inline bool searches_in_float(const Crystallize& call) {
  const bool wide = call.dtype == DType::f64 || (call.y != nullptr && call.y_dtype == DType::f64);
  return !wide && call.precision <= 1024;
}

}  // namespace syntonic
