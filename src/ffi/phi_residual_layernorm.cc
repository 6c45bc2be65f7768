#include "ops/phi_residual_layernorm.h"

#include "targets.h"

namespace syntonic {
namespace {

// Bits of the attribute `operands`.
constexpr int32_t kScale = 1;
constexpr int32_t kBias = 2;
// Bits of the attribute `results`.
constexpr int32_t kZ = 1;
constexpr int32_t kStatistics = 2;

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               double sum_scale, double residual_scale, double epsilon, double scale_factor,
               int32_t given, int32_t wanted) {
  Call call("syntonic_phi_residual_layernorm", operands, results);
  call.finite("sum_scale", sum_scale);
  call.finite("residual_scale", residual_scale);
  call.finite("epsilon", epsilon);
  call.finite("scale_factor", scale_factor);
  call.require(epsilon >= 0, "attribute epsilon must not be negative, got ", epsilon);
  call.in_range("operands", given, 0, 3);
  call.in_range("results", wanted, 0, 3);
  const Array identity = call.operand("identity");
  const Array residual = call.operand("residual");
  const Array scale = call.operand_if(given & kScale, "scale");
  const Array bias = call.operand_if(given & kBias, "bias");
  const Array y = call.result("y");
  const Array z = call.result_if(wanted & kZ, "z");
  const Array statistics = call.result_if(wanted & kStatistics, "statistics");
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

// Bits of the attributes `operands` and `results` of the cotangent.
constexpr int32_t kCtZ = 2;
constexpr int32_t kDIdentity = 1;
constexpr int32_t kDResidual = 2;
constexpr int32_t kDScale = 4;
constexpr int32_t kDBias = 8;

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         double identity_scale, double residual_scale, double scale_factor,
                         int32_t given, int32_t wanted) {
  Call call("syntonic_phi_residual_layernorm_cotangent", operands, results);
  call.finite("identity_scale", identity_scale);
  call.finite("residual_scale", residual_scale);
  call.finite("scale_factor", scale_factor);
  call.in_range("operands", given, 0, 3);
  call.in_range("results", wanted, 1, 15);
  const Array z = call.operand("z");
  const Array statistics = call.operand("statistics");
  const Array scale = call.operand_if(given & kScale, "scale");
  const Array ct_y = call.operand("ct_y");
  const Array ct_z = call.operand_if(given & kCtZ, "ct_z");
  const Array d_identity = call.result_if(wanted & kDIdentity, "d_identity");
  const Array d_residual = call.result_if(wanted & kDResidual, "d_residual");
  const Array d_scale = call.result_if(wanted & kDScale, "d_scale");
  const Array d_bias = call.result_if(wanted & kDBias, "d_bias");
  const Array scratch = call.result_if(wanted & (kDScale | kDBias), "scratch");
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
                           .Attr<double>("scale_factor")
                           .Attr<int32_t>("operands")
                           .Attr<int32_t>("results"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent,
                       execute()
                           .Attr<double>("identity_scale")
                           .Attr<double>("residual_scale")
                           .Attr<double>("scale_factor")
                           .Attr<int32_t>("operands")
                           .Attr<int32_t>("results"),
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
