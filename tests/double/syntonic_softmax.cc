#include "softmax.h"

namespace syntonic {

Status syntonic_softmax(Stream, const SyntonicSoftmax& call) {
  const SoftmaxLogits& logits = call.logits;
  const DType acc = accumulation(logits.dtype);
  for_rows(logits.shape, [&](const Row& row) {
    const std::vector<double> z = logits_of(logits, row);
    const Normaliser of = normaliser_of(logits, row, z);
    for (int64_t i = 0; i < row.width; ++i) {
      const double y = (z[i] - of.max) - of.log_sum;
      const double value = !counts(logits, row.at(i)) ? -kInfinity : y;
      store(call.y, logits.dtype, row.at(i), call.log ? value : std::exp(value));
    }
    store(call.max, acc, row.number, of.max);
    store(call.log_sum, acc, row.number, of.log_sum);
  });
  return kSuccess;
}

Status syntonic_softmax_cotangent(Stream, const SyntonicSoftmaxCotangent& call) {
  const SoftmaxLogits& logits = call.logits;
  const DType dtype = logits.dtype, acc = accumulation(dtype);
  const int64_t rows = logits.shape.rows() / call.partials, width = logits.shape.width;
  std::vector<double> d_bias(call.partials * width);
  spoil(call.scratch, acc, call.scratch_size);
  for_rows(logits.shape, [&](const Row& row) {
    std::vector<double> p(width), ct(width);
    if (!call.y) p = logits_of(logits, row);
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row.at(i);
      if (!counts(logits, at)) {
        p[i] = 0;
        continue;
      }
      p[i] = call.y ? load(call.y, dtype, at)
                    : std::exp((p[i] - load(call.max, acc, row.number)) -
                               load(call.log_sum, acc, row.number));
      ct[i] = load(call.ct, dtype, at);
      sum += call.y ? p[i] * ct[i] : ct[i];
    }
    for (int64_t i = 0; i < width; ++i) {
      const double d_z = call.y ? p[i] * (ct[i] - sum) : ct[i] - p[i] * sum;
      const double value = counts(logits, row.at(i)) ? d_z : 0;
      store(call.d_z, dtype, row.at(i), value);
      d_bias[row.number / rows * width + i] += value;
    }
  });
  for (int64_t i = 0; i < call.partials * width; ++i) store(call.d_bias, acc, i, d_bias[i]);
  return kSuccess;
}

Status load_syntonic_softmax(DType) { return kSuccess; }

}  // namespace syntonic
