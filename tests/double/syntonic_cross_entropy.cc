#include "ops/syntonic_cross_entropy.h"

#include "softmax.h"

namespace syntonic {
namespace {

bool label_counts(const SoftmaxLogits& logits, const Row& row, int32_t label) {
  return label >= 0 && label < row.width && counts(logits, row.at(label));
}

}  // namespace

Status syntonic_cross_entropy(Stream, const SyntonicCrossEntropy& call) {
  const SoftmaxLogits& logits = call.logits;
  const DType acc = accumulation(logits.dtype);
  for_rows(logits.shape, [&](const Row& row) {
    const std::vector<double> z = logits_of(logits, row);
    const Normaliser of = normaliser_of(logits, row, z);
    const int32_t label = call.labels[row.number];
    const bool any = label_counts(logits, row, label);
    double loss = label < 0 || label >= row.width ? NAN : kInfinity;
    if (any) loss = (of.max - z[label]) + of.log_sum;
    if (of.log_sum == -kInfinity || (label < 0 && label == call.ignored)) loss = 0;
    store(call.loss, acc, row.number, loss);
    store(call.max, acc, row.number, any ? of.max : 0);
    store(call.log_sum, acc, row.number, any ? of.log_sum : 0);
  });
  return kSuccess;
}

Status syntonic_cross_entropy_cotangent(Stream, const SyntonicCrossEntropyCotangent& call) {
  const SoftmaxLogits& logits = call.logits;
  const DType acc = accumulation(logits.dtype);
  const int64_t rows = logits.shape.rows() / call.partials, width = logits.shape.width;
  std::vector<double> d_bias(call.partials * width);
  spoil(call.scratch, acc, call.scratch_size);
  for_rows(logits.shape, [&](const Row& row) {
    const std::vector<double> z = logits_of(logits, row);
    const int32_t label = call.labels[row.number];
    const bool any = label_counts(logits, row, label);
    for (int64_t i = 0; i < width; ++i) {
      const double p =
          std::exp((z[i] - load(call.max, acc, row.number)) - load(call.log_sum, acc, row.number));
      const double d_z = any && counts(logits, row.at(i))
                             ? load(call.ct, acc, row.number) * (p - (i == label))
                             : 0;
      store(call.d_z, logits.dtype, row.at(i), d_z);
      d_bias[row.number / rows * width + i] += d_z;
    }
  });
  for (int64_t i = 0; i < call.partials * width; ++i) store(call.d_bias, acc, i, d_bias[i]);
  return kSuccess;
}

Status load_syntonic_cross_entropy(DType) { return kSuccess; }

}  // namespace syntonic
