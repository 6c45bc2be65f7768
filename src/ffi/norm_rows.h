// The handlers of the norms of rows: what they check, and what they launch.
#pragma once

#include "ops/norm_rows.h"
#include "targets.h"

namespace syntonic {

// What tells one norm from another. Its operand is `x`, or with a residual `identity` and
// `residual`, of which the backward pass reads the sum `z`.
struct NormOfRows {
  const char* target;
  const char* cotangent_target;
  bool residual;
  bool bias;
  int64_t statistics;  // numbers that are kept of a row
  Status (*launch)(Stream, const NormRows&);
  Status (*launch_cotangent)(Stream, const NormRowsCotangent&);
};

// `norm` comes with its numbers.
inline ffi::Error run_norm(const NormOfRows& of, Call& call, Stream stream, NormRows norm) {
  call.finite("sum_scale", norm.sum_scale);
  call.finite("residual_scale", norm.residual_scale);
  call.finite("epsilon", norm.epsilon);
  call.finite("scale_factor", norm.scale_factor);
  call.require(norm.epsilon >= 0, "attribute epsilon must not be negative, got ", norm.epsilon);
  const Array identity = call.operand(of.residual ? "identity" : "x");
  const Array residual = of.residual ? call.operand("residual") : Array{};
  const Array scale = call.optional_operand("scale");
  const Array bias = of.bias ? call.optional_operand("bias") : Array{};
  const Array y = call.result("y");
  const Array z = of.residual ? call.optional_result("z") : Array{};
  const Array statistics = call.optional_result("statistics");
  for (const Array& array : {residual, y, z}) call.has_shape_of(array, identity);
  for (const Array& array : {residual, z}) call.has_dtype(array, identity.dtype);
  norm.rows = call.rows(identity, {scale, bias});
  call.has_dtype(statistics, accumulation(identity.dtype));
  call.has_count(statistics, of.statistics * norm.rows.total());
  norm.identity = identity.data;
  norm.residual = residual.data;
  norm.scale = scale.data;
  norm.bias = bias.data;
  norm.y = y.data;
  norm.z = z.data;
  norm.statistics = statistics.data;
  norm.dtype = identity.dtype;
  norm.y_dtype = y.dtype;
  return call.launch(stream, norm.rows.total(), {}, [&] { return of.launch(stream, norm); });
}

inline ffi::Error run_norm_cotangent(const NormOfRows& of, Call& call, Stream stream,
                                     NormRowsCotangent norm) {
  call.finite("identity_scale", norm.identity_scale);
  call.finite("residual_scale", norm.residual_scale);
  call.finite("scale_factor", norm.scale_factor);
  const char* const name = of.residual ? "z" : "x";
  const Array z = call.operand(name);
  const Array statistics = call.operand("statistics");
  const Array scale = call.optional_operand("scale");
  const Array ct_y = call.operand("ct_y");
  const Array ct_z = of.residual ? call.optional_operand("ct_z") : Array{};
  const Array d_identity = call.optional_result(of.residual ? "d_identity" : "d_x");
  const Array d_residual = of.residual ? call.optional_result("d_residual") : Array{};
  const Array d_scale = call.optional_result("d_scale");
  const Array d_bias = of.bias ? call.optional_result("d_bias") : Array{};
  const bool sums = d_scale.present() || d_bias.present();
  const Array scratch = sums ? call.result("scratch") : Array{};
  for (const Array& array : {ct_y, ct_z, d_identity, d_residual}) call.has_shape_of(array, z);
  for (const Array& array : {ct_z, d_identity, d_residual}) call.has_dtype(array, z.dtype);
  for (const Array& array : {statistics, d_scale, d_bias, scratch}) {
    call.has_dtype(array, accumulation(z.dtype));
  }
  norm.rows = call.rows(z, {scale});
  call.has_count(statistics, of.statistics * norm.rows.total());
  norm.partials = call.partials(d_scale, d_bias, norm.rows, name);
  norm.z = z.data;
  norm.statistics = statistics.data;
  norm.scale = scale.data;
  norm.ct_y = ct_y.data;
  norm.ct_z = ct_z.data;
  norm.d_identity = d_identity.data;
  norm.d_residual = d_residual.data;
  norm.d_scale = d_scale.data;
  norm.d_bias = d_bias.data;
  norm.scratch = scratch.data;
  norm.scratch_size = scratch.count;
  norm.dtype = z.dtype;
  norm.y_dtype = ct_y.dtype;
  return call.launch(stream, norm.rows.total(), {d_scale, d_bias},
                     [&] { return of.launch_cotangent(stream, norm); });
}

// The handlers of one norm: of a residual sum, or of x alone.
template <const NormOfRows& of>
struct NormHandlers {
  static ffi::Error sum(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                        Names operand_names, Names result_names, double sum_scale,
                        double residual_scale, double epsilon, double scale_factor) {
    Call call(of.target, operands, results, operand_names, result_names);
    NormRows norm = {};
    norm.sum_scale = sum_scale;
    norm.residual_scale = residual_scale;
    norm.epsilon = epsilon;
    norm.scale_factor = scale_factor;
    return run_norm(of, call, stream, norm);
  }

  static ffi::Error sum_cotangent(Stream stream, ffi::RemainingArgs operands,
                                  ffi::RemainingRets results, Names operand_names,
                                  Names result_names, double identity_scale, double residual_scale,
                                  double scale_factor) {
    Call call(of.cotangent_target, operands, results, operand_names, result_names);
    NormRowsCotangent norm = {};
    norm.identity_scale = identity_scale;
    norm.residual_scale = residual_scale;
    norm.scale_factor = scale_factor;
    return run_norm_cotangent(of, call, stream, norm);
  }

  static ffi::Error plain(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                          Names operand_names, Names result_names, double epsilon,
                          double scale_factor) {
    return sum(stream, operands, results, operand_names, result_names, 1, 0, epsilon, scale_factor);
  }

  static ffi::Error plain_cotangent(Stream stream, ffi::RemainingArgs operands,
                                    ffi::RemainingRets results, Names operand_names,
                                    Names result_names, double scale_factor) {
    return sum_cotangent(stream, operands, results, operand_names, result_names, 1, 0,
                         scale_factor);
  }
};

// The attributes that they are bound to.
inline auto sum_attributes() {
  return execute()
      .Attr<double>("sum_scale")
      .Attr<double>("residual_scale")
      .Attr<double>("epsilon")
      .Attr<double>("scale_factor");
}
inline auto sum_cotangent_attributes() {
  return execute()
      .Attr<double>("identity_scale")
      .Attr<double>("residual_scale")
      .Attr<double>("scale_factor");
}
inline auto plain_attributes() {
  return execute().Attr<double>("epsilon").Attr<double>("scale_factor");
}
inline auto plain_cotangent_attributes() { return execute().Attr<double>("scale_factor"); }

}  // namespace syntonic
