#include "ops/crystallize.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names, int32_t precision) {
  Call call("syntonic_crystallize", operands, results, operand_names, result_names);
  call.in_range("precision", precision, 1, 1 << 20);
  const Array x = call.operand("x");
  const bool value = call.has_result("y");
  const Array y = call.optional_result("y");
  const Array a = value ? Array{} : call.integer_result("a");
  const Array b = value ? Array{} : call.integer_result("b");
  for (const Array& array : {y, a, b}) call.has_shape_of(array, x);
  const Crystallize arguments{
      .x = x.data,
      .y = y.data,
      .a = static_cast<int32_t*>(a.data),
      .b = static_cast<int32_t*>(b.data),
      .dtype = x.dtype,
      .y_dtype = y.dtype,
      .count = x.count,
      .precision = precision,
  };
  return call.launch(stream, x.count, {}, [&] { return crystallize(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute().Attr<int32_t>("precision"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_crystallize>, initialize_by_operand());

const Registration kRegistration("crystallize", {{"syntonic_crystallize", kRun, kLoad}});

}  // namespace

}  // namespace syntonic
