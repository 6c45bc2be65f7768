#include "ops/golden_gelu.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names) {
  Call call("syntonic_golden_gelu", operands, results, operand_names, result_names);
  const Array x = call.operand("x");
  const Array y = call.result("y");
  call.has_shape_of(y, x);
  const GoldenGelu arguments{
      .x = x.data,
      .y = y.data,
      .dtype = x.dtype,
      .y_dtype = y.dtype,
      .count = x.count,
  };
  return call.launch(stream, x.count, {}, [&] { return golden_gelu(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names) {
  Call call("syntonic_golden_gelu_cotangent", operands, results, operand_names, result_names);
  const Array x = call.operand("x");
  const Array ct = call.operand("ct_y");
  const Array dx = call.result("d_x");
  call.has_shape_of(ct, x);
  call.has_shape_of(dx, x);
  call.has_dtype(dx, x.dtype);
  const GoldenGeluCotangent arguments{
      .x = x.data,
      .ct = ct.data,
      .dx = dx.data,
      .dtype = x.dtype,
      .y_dtype = ct.dtype,
      .count = x.count,
  };
  return call.launch(stream, x.count, {}, [&] { return golden_gelu_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent, execute(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_golden_gelu>, initialize_by_operand());

const Registration kRegistration("golden_gelu",
                                 {
                                     {"syntonic_golden_gelu", kRun, kLoad},
                                     {"syntonic_golden_gelu_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
