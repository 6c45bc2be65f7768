#include "ops/syntonic_softmax.h"

#include "logits.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names, int32_t inner, int32_t log) {
  Call call("syntonic_softmax", operands, results, operand_names, result_names);
  call.in_range("inner", inner, 0, 1);
  call.in_range("log", log, 0, 1);
  const SoftmaxLogits logits = read_logits(call, "x", inner);
  const Array y = call.result("y");
  const Array max = call.optional_result("max");
  const Array log_sum = max.present() ? call.result("log_sum") : Array{};
  has_elements_of(call, y, logits);
  for (const Array& array : {max, log_sum}) has_rows_of(call, array, logits);
  const SyntonicSoftmax arguments{
      .logits = logits,
      .y = y.data,
      .max = max.data,
      .log_sum = log_sum.data,
      .log = log != 0,
  };
  return call.launch(stream, logits.shape.elements(), {},
                     [&] { return syntonic_softmax(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names, int32_t inner) {
  Call call("syntonic_softmax_cotangent", operands, results, operand_names, result_names);
  call.in_range("inner", inner, 0, 1);
  const bool log = call.has_operand("x");
  SoftmaxLogits logits = read_logits(call, log ? "x" : "y", inner);
  call.require(log || (!logits.bias && !logits.weights), "takes no bias and no weights beside y");
  const Array max = log ? call.operand("max") : Array{};
  const Array log_sum = log ? call.operand("log_sum") : Array{};
  const Array ct = call.operand("ct_y");
  const Array d_z = call.optional_result("d_z");
  const Array d_bias = call.optional_result("d_bias");
  const Array scratch = d_bias.present() ? call.result("scratch") : Array{};
  for (const Array& array : {ct, d_z}) has_elements_of(call, array, logits);
  for (const Array& array : {max, log_sum}) has_rows_of(call, array, logits);
  const int64_t partials = partials_of(call, d_bias, scratch, logits, log ? "x" : "y");
  call.require(!d_bias.present() || scratch.count >= logits.shape.rows() + 3,
               "scratch must have at least ", logits.shape.rows() + 3, " elements, got ",
               scratch.dims);
  const void* y = log ? nullptr : std::exchange(logits.x, nullptr);
  const SyntonicSoftmaxCotangent arguments{
      .logits = logits,
      .y = y,
      .max = max.data,
      .log_sum = log_sum.data,
      .ct = ct.data,
      .d_z = d_z.data,
      .d_bias = d_bias.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .partials = partials,
  };
  return call.launch(stream, logits.shape.elements(), {d_bias},
                     [&] { return syntonic_softmax_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute().Attr<int32_t>("inner").Attr<int32_t>("log"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent, execute().Attr<int32_t>("inner"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_syntonic_softmax>, initialize_by_operand());

const Registration kRegistration("syntonic_softmax",
                                 {
                                     {"syntonic_softmax", kRun, kLoad},
                                     {"syntonic_softmax_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
