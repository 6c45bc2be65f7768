#include "ops/phi_residual_layernorm.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names, double sum_scale, double residual_scale,
               double epsilon, double scale_factor) {
  Call call("syntonic_phi_residual_layernorm", operands, results, operand_names, result_names);
  call.finite("sum_scale", sum_scale);
  call.finite("residual_scale", residual_scale);
  call.finite("epsilon", epsilon);
  call.finite("scale_factor", scale_factor);
  call.require(epsilon >= 0, "attribute epsilon must not be negative, got ", epsilon);
  const Array identity = call.operand("identity");
  const Array residual = call.operand("residual");
  const Array scale = call.optional_operand("scale");
  const Array bias = call.optional_operand("bias");
  const Array y = call.result("y");
  const Array z = call.optional_result("z");
  const Array statistics = call.optional_result("statistics");
  for (const Array& array : {residual, y, z}) call.has_shape_of(array, identity);
  for (const Array& array : {residual, z}) call.has_dtype(array, identity.dtype);
  const Rows rows = call.rows(identity, {scale, bias});
  call.has_dtype(statistics, accumulation(identity.dtype));
  call.has_count(statistics, kRowStatistics * rows.total());
  const PhiResidualLayernorm arguments{
      .identity = identity.data,
      .residual = residual.data,
      .scale = scale.data,
      .bias = bias.data,
      .y = y.data,
      .z = z.data,
      .statistics = statistics.data,
      .dtype = identity.dtype,
      .y_dtype = y.dtype,
      .rows = rows,
      .sum_scale = sum_scale,
      .residual_scale = residual_scale,
      .epsilon = epsilon,
      .scale_factor = scale_factor,
  };
  return call.launch(stream, rows.total(), {},
                     [&] { return phi_residual_layernorm(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names, double identity_scale,
                         double residual_scale, double scale_factor) {
  Call call("syntonic_phi_residual_layernorm_cotangent", operands, results, operand_names,
            result_names);
  call.finite("identity_scale", identity_scale);
  call.finite("residual_scale", residual_scale);
  call.finite("scale_factor", scale_factor);
  const Array z = call.operand("z");
  const Array statistics = call.operand("statistics");
  const Array scale = call.optional_operand("scale");
  const Array ct_y = call.operand("ct_y");
  const Array ct_z = call.optional_operand("ct_z");
  const Array d_identity = call.optional_result("d_identity");
  const Array d_residual = call.optional_result("d_residual");
  const Array d_scale = call.optional_result("d_scale");
  const Array d_bias = call.optional_result("d_bias");
  const bool sums = d_scale.present() || d_bias.present();
  const Array scratch = sums ? call.result("scratch") : Array{};
  const DType acc = accumulation(z.dtype);
  for (const Array& array : {ct_y, ct_z, d_identity, d_residual}) call.has_shape_of(array, z);
  for (const Array& array : {ct_z, d_identity, d_residual}) call.has_dtype(array, z.dtype);
  for (const Array& array : {statistics, d_scale, d_bias, scratch}) call.has_dtype(array, acc);
  const Rows rows = call.rows(z, {scale});
  call.has_count(statistics, kRowStatistics * rows.total());
  const int64_t partials = call.partials(d_scale, d_bias, rows, "z");
  const PhiResidualLayernormCotangent arguments{
      .z = z.data,
      .statistics = statistics.data,
      .scale = scale.data,
      .ct_y = ct_y.data,
      .ct_z = ct_z.data,
      .d_identity = d_identity.data,
      .d_residual = d_residual.data,
      .d_scale = d_scale.data,
      .d_bias = d_bias.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .dtype = z.dtype,
      .y_dtype = ct_y.dtype,
      .rows = rows,
      .partials = partials,
      .identity_scale = identity_scale,
      .residual_scale = residual_scale,
      .scale_factor = scale_factor,
  };
  return call.launch(stream, rows.total(), {d_scale, d_bias},
                     [&] { return phi_residual_layernorm_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run,
                       execute()
                           .Attr<double>("sum_scale")
                           .Attr<double>("residual_scale")
                           .Attr<double>("epsilon")
                           .Attr<double>("scale_factor"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent,
                       execute()
                           .Attr<double>("identity_scale")
                           .Attr<double>("residual_scale")
                           .Attr<double>("scale_factor"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_phi_residual_layernorm>,
                       initialize_by_operand());

const Registration kRegistration("phi_residual_layernorm",
                                 {
                                     {"syntonic_phi_residual_layernorm", kRun, kLoad},
                                     {"syntonic_phi_residual_layernorm_cotangent", kRunCotangent,
                                      kLoad},
                                 });

}  // namespace

}  // namespace syntonic
