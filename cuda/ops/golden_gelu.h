// y = x * sigmoid(phi * x).
#pragma once

#include "core/types.h"

namespace syntonic {

struct GoldenGelu {
  const void* x;  // dtype, count elements
  void* y;        // y_dtype
  DType dtype;
  DType y_dtype;
  int64_t count;
};
Status golden_gelu(Stream stream, const GoldenGelu& call);

// dx = golden_gelu'(x) * ct. The derivative is diagonal, so this is the tangent map as well.
struct GoldenGeluCotangent {
  const void* x;   // dtype, count elements
  const void* ct;  // y_dtype
  void* dx;        // dtype
  DType dtype;
  DType y_dtype;
  int64_t count;
};
Status golden_gelu_cotangent(Stream stream, const GoldenGeluCotangent& call);

Status load_golden_gelu(DType dtype);

}  // namespace syntonic
