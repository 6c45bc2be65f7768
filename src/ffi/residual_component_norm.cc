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

XLA_FFI_DEFINE_HANDLER(kRun, run, execute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_sum_of_squares>, initialize_by_operand());

}  // namespace

std::vector<Target> residual_component_norm_targets() {
  return {{"syntonic_sum_of_squares", kRun, kLoad}};
}

}  // namespace syntonic
