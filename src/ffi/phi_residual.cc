#include "ops/phi_residual.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names, double sum_scale, double residual_scale,
               int32_t activation) {
  Call call("syntonic_phi_residual", operands, results, operand_names, result_names);
  call.finite("sum_scale", sum_scale);
  call.finite("residual_scale", residual_scale);
  call.in_range("activation", activation, 0, 3);
  const Array identity = call.operand("identity");
  const Array residual = call.operand("residual");
  const Array y = call.result("y");
  const Array z = call.optional_result("z");
  for (const Array& array : {residual, y, z}) call.has_shape_of(array, identity);
  for (const Array& array : {residual, z}) call.has_dtype(array, identity.dtype);
  const PhiResidual arguments{
      .identity = identity.data,
      .residual = residual.data,
      .y = y.data,
      .z = z.data,
      .dtype = identity.dtype,
      .y_dtype = y.dtype,
      .count = identity.count,
      .sum_scale = sum_scale,
      .residual_scale = residual_scale,
      .activation = static_cast<Activation>(activation),
  };
  return call.launch(stream, identity.count, {}, [&] { return phi_residual(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names, double identity_scale,
                         double residual_scale, int32_t activation) {
  Call call("syntonic_phi_residual_cotangent", operands, results, operand_names, result_names);
  call.finite("identity_scale", identity_scale);
  call.finite("residual_scale", residual_scale);
  call.in_range("activation", activation, 0, 3);
  const bool saves = activation != static_cast<int32_t>(Activation::none);
  // relu may leave its value instead of its argument.
  const bool of_y = activation == static_cast<int32_t>(Activation::relu) && call.has_operand("y");
  const Array saved = saves ? call.operand(of_y ? "y" : "z") : Array{};
  const Array ct = call.operand("ct_y");
  const Array d_identity = call.optional_result("d_identity");
  const Array d_residual = call.optional_result("d_residual");
  const DType dtype = d_identity.present() ? d_identity.dtype : d_residual.dtype;
  for (const Array& array : {saved, d_identity, d_residual}) call.has_shape_of(array, ct);
  for (const Array& array : {d_identity, d_residual}) call.has_dtype(array, dtype);
  call.has_dtype(saved, of_y ? ct.dtype : dtype);
  const PhiResidualCotangent arguments{
      .saved = saved.data,
      .ct = ct.data,
      .d_identity = d_identity.data,
      .d_residual = d_residual.data,
      .dtype = dtype,
      .y_dtype = ct.dtype,
      .saved_dtype = saved.dtype,
      .count = ct.count,
      .identity_scale = identity_scale,
      .residual_scale = residual_scale,
      .activation = static_cast<Activation>(activation),
  };
  return call.launch(stream, ct.count, {},
                     [&] { return phi_residual_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(
    kRun, run,
    execute().Attr<double>("sum_scale").Attr<double>("residual_scale").Attr<int32_t>("activation"),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent,
                       execute()
                           .Attr<double>("identity_scale")
                           .Attr<double>("residual_scale")
                           .Attr<int32_t>("activation"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_phi_residual>, initialize_by_operand());
// The operands of the cotangent may all be of the type of y.
XLA_FFI_DEFINE_HANDLER(kLoadCotangent, load_for_result<load_phi_residual>, initialize_by_result());

const Registration kRegistration("phi_residual", {
                                                     {"syntonic_phi_residual", kRun, kLoad},
                                                     {"syntonic_phi_residual_cotangent",
                                                      kRunCotangent, kLoadCotangent},
                                                 });

}  // namespace

}  // namespace syntonic
