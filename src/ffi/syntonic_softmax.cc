#include "ops/syntonic_softmax.h"

#include "logits.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               int32_t given, int32_t inner, int32_t log, int32_t statistics) {
  Call call("syntonic_softmax", operands, results);
  call.in_range("operands", given, 0, 7);
  call.in_range("inner", inner, 0, 1);
  call.in_range("log", log, 0, 1);
  call.in_range("statistics", statistics, 0, 1);
  const SoftmaxLogits logits = read_logits(call, "x", given, inner);
  const Array y = call.result("y");
  const Array max = call.result_if(statistics, "max");
  const Array log_sum = call.result_if(statistics, "log_sum");
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
                         int32_t given, int32_t inner, int32_t log, int32_t wanted) {
  Call call("syntonic_softmax_cotangent", operands, results);
  call.in_range("operands", given, 0, 7);
  call.in_range("inner", inner, 0, 1);
  call.in_range("log", log, 0, 1);
  call.in_range("results", wanted, 1, 3);
  call.require(log || (given & ~kMask) == 0,
               "attribute operands must be 0 or 4 for a softmax, got ", given);
  SoftmaxLogits logits = read_logits(call, log ? "x" : "y", given, inner);
  const Array max = call.operand_if(log, "max");
  const Array log_sum = call.operand_if(log, "log_sum");
  const Array ct = call.operand("ct");
  const Array d_z = call.result_if(wanted & kDZ, "d_z");
  const Array d_bias = call.result_if(wanted & kDBias, "d_bias");
  const Array scratch = call.result_if(wanted & kDBias, "scratch");
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

XLA_FFI_DEFINE_HANDLER(kRun, run,
                       execute()
                           .Attr<int32_t>("operands")
                           .Attr<int32_t>("inner")
                           .Attr<int32_t>("log")
                           .Attr<int32_t>("statistics"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent,
                       execute()
                           .Attr<int32_t>("operands")
                           .Attr<int32_t>("inner")
                           .Attr<int32_t>("log")
                           .Attr<int32_t>("results"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_syntonic_softmax>, initialize_by_operand());

const Registration kRegistration("syntonic_softmax",
                                 {
                                     {"syntonic_softmax", kRun, kLoad},
                                     {"syntonic_softmax_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
