// A layer norm is that of a residual sum without a residual: the same kernels.
#include "ops/golden_layer_norm.h"
#include "ops/phi_residual_layernorm.h"

namespace syntonic {

Status golden_layer_norm(Stream stream, const GoldenLayerNorm& call) {
  PhiResidualLayernorm same = {};
  same.identity = call.x;
  same.scale = call.scale;
  same.bias = call.bias;
  same.y = call.y;
  same.statistics = call.statistics;
  same.dtype = call.dtype;
  same.y_dtype = call.y_dtype;
  same.rows = call.rows;
  same.sum_scale = 1;
  same.epsilon = call.epsilon;
  same.scale_factor = call.scale_factor;
  return phi_residual_layernorm(stream, same);
}

Status golden_layer_norm_cotangent(Stream stream, const GoldenLayerNormCotangent& call) {
  PhiResidualLayernormCotangent same = {};
  same.z = call.x;
  same.statistics = call.statistics;
  same.scale = call.scale;
  same.ct_y = call.ct_y;
  same.d_identity = call.d_x;
  same.d_scale = call.d_scale;
  same.d_bias = call.d_bias;
  same.scratch = call.scratch;
  same.scratch_size = call.scratch_size;
  same.dtype = call.dtype;
  same.y_dtype = call.y_dtype;
  same.rows = call.rows;
  same.partials = call.partials;
  same.identity_scale = 1;
  same.scale_factor = call.scale_factor;
  return phi_residual_layernorm_cotangent(stream, same);
}

Status load_golden_layer_norm(DType dtype) { return load_phi_residual_layernorm(dtype); }

}  // namespace syntonic
