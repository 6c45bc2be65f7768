#include "ops/residual_component_norm.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names) {
  Call call("syntonic_sum_of_squares", operands, results, operand_names, result_names);
  const Array x = call.operand("x");
  const Array sums = call.result("sums");
  const Array scratch = call.result("scratch");
  for (const Array& array : {sums, scratch}) call.has_dtype(array, accumulation(x.dtype));
  const int64_t partials = sums.count / 3;
  call.require(sums.count % 3 == 0 && Call::divides(partials, x.count), "sums has ", sums.count,
               " elements, not three for each of some parts of the ", x.count, " of x");
  const SumOfSquares arguments{
      .x = x.data,
      .sums = sums.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .dtype = x.dtype,
      .partials = partials,
      .count = partials > 0 ? x.count / partials : 0,
  };
  return call.launch(stream, x.count, {sums}, [&] { return sum_of_squares(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names) {
  Call call("syntonic_sum_of_squares_cotangent", operands, results, operand_names, result_names);
  const Array x = call.operand("x");
  const Array first = call.operand("first");
  const Array second = call.operand("second");
  const Array dx = call.result("dx");
  call.has_shape_of(dx, x);
  call.has_dtype(dx, x.dtype);
  for (const Array& array : {first, second}) call.has_dtype(array, accumulation(x.dtype));
  call.has_shape_of(second, first);
  call.require(Call::divides(first.count, x.count), "first has ", first.count,
               " elements, which do not divide the ", x.count, " of x");
  const SumOfSquaresCotangent arguments{
      .x = x.data,
      .first = first.data,
      .second = second.data,
      .dx = dx.data,
      .dtype = x.dtype,
      .partials = first.count,
      .count = first.count > 0 ? x.count / first.count : 0,
  };
  return call.launch(stream, x.count, {},
                     [&] { return sum_of_squares_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent, execute(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_sum_of_squares>, initialize_by_operand());

const Registration kRegistration("residual_component_norm",
                                 {
                                     {"syntonic_sum_of_squares", kRun, kLoad},
                                     {"syntonic_sum_of_squares_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
