#include "residual_component_norm.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Call call("syntonic_sum_of_squares", operands, results);
  const Array x = call.operand("x");
  const Array sums = call.result("sums");
  const Array scratch = call.result("scratch");
  for (const Array& array : {sums, scratch}) call.has_dtype(array, accumulation(x.dtype));
  call.require(Call::divides(sums.count, x.count), "sums has ", sums.count,
               " elements, which do not divide the ", x.count, " of x");
  const SumOfSquares arguments{
      .x = x.data,
      .sums = sums.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .dtype = x.dtype,
      .partials = sums.count,
      .count = sums.count > 0 ? x.count / sums.count : 0,
  };
  return call.launch(stream, x.count, {sums}, [&] { return sum_of_squares(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Call call("syntonic_sum_of_squares_cotangent", operands, results);
  const Array x = call.operand("x");
  const Array ct = call.operand("ct");
  const Array dx = call.result("dx");
  call.has_shape_of(dx, x);
  call.has_dtype(dx, x.dtype);
  call.has_dtype(ct, accumulation(x.dtype));
  call.require(Call::divides(ct.count, x.count), "ct has ", ct.count,
               " elements, which do not divide the ", x.count, " of x");
  const SumOfSquaresCotangent arguments{
      .x = x.data,
      .ct = ct.data,
      .dx = dx.data,
      .dtype = x.dtype,
      .partials = ct.count,
      .count = ct.count > 0 ? x.count / ct.count : 0,
  };
  return call.launch(stream, x.count, {},
                     [&] { return sum_of_squares_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent, execute(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_sum_of_squares>, initialize_by_operand());

}  // namespace

std::vector<Target> residual_component_norm_targets() {
  return {
      {"syntonic_sum_of_squares", kRun, kLoad},
      {"syntonic_sum_of_squares_cotangent", kRunCotangent, kLoad},
  };
}

}  // namespace syntonic
