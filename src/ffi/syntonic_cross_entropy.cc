#include "ops/syntonic_cross_entropy.h"

#include <limits>

#include "logits.h"

namespace syntonic {
namespace {

Array read_labels(Call& call, const SoftmaxLogits& logits) {
  const Array labels = call.operand_of(ffi::DataType::S32, "int32", 4, "labels");
  call.has_count(labels, logits.shape.rows());
  return labels;
}

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names, int32_t ignored) {
  Call call("syntonic_cross_entropy", operands, results, operand_names, result_names);
  call.in_range("ignored", ignored, std::numeric_limits<int32_t>::min(), 0);
  const SoftmaxLogits logits = read_logits(call, "x", false);
  const Array labels = read_labels(call, logits);
  const Array loss = call.result("loss");
  const Array max = call.optional_result("max");
  const Array log_sum = max.present() ? call.result("log_sum") : Array{};
  for (const Array& array : {loss, max, log_sum}) has_rows_of(call, array, logits);
  const SyntonicCrossEntropy arguments{
      .logits = logits,
      .labels = static_cast<const int32_t*>(labels.data),
      .ignored = ignored,
      .loss = loss.data,
      .max = max.data,
      .log_sum = log_sum.data,
  };
  return call.launch(stream, logits.shape.elements(), {},
                     [&] { return syntonic_cross_entropy(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names) {
  Call call("syntonic_cross_entropy_cotangent", operands, results, operand_names, result_names);
  const SoftmaxLogits logits = read_logits(call, "x", false);
  const Array labels = read_labels(call, logits);
  const Array max = call.operand("max");
  const Array log_sum = call.operand("log_sum");
  const Array ct = call.operand("ct_loss");
  const Array d_z = call.optional_result("d_z");
  const Array d_bias = call.optional_result("d_bias");
  const Array scratch = d_bias.present() ? call.result("scratch") : Array{};
  for (const Array& array : {max, log_sum, ct}) has_rows_of(call, array, logits);
  has_elements_of(call, d_z, logits);
  const int64_t partials = partials_of(call, d_bias, scratch, logits, "x");
  const SyntonicCrossEntropyCotangent arguments{
      .logits = logits,
      .labels = static_cast<const int32_t*>(labels.data),
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
                     [&] { return syntonic_cross_entropy_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute().Attr<int32_t>("ignored"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent, execute(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_syntonic_cross_entropy>,
                       initialize_by_operand());

const Registration kRegistration("syntonic_cross_entropy",
                                 {
                                     {"syntonic_cross_entropy", kRun, kLoad},
                                     {"syntonic_cross_entropy_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
