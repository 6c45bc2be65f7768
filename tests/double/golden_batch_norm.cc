#include "ops/golden_batch_norm.h"

#include "numbers.h"

namespace syntonic {
namespace {

// Calls body(element) for every element of a channel of a partial.
template <typename Body>
void for_channel(const Channels& shape, int64_t result, const Body& body) {
  const int64_t partial = result / shape.count, channel = result % shape.count;
  for (int64_t o = 0; o < shape.outer; ++o) {
    const int64_t row = (partial * shape.outer + o) * shape.count + channel;
    for (int64_t i = 0; i < shape.inner; ++i) body(row * shape.inner + i);
  }
}

// Where the parameters of a group have the entry of a result.
int64_t of_group(const Channels& shape, int64_t groups, int64_t result) {
  return result / (shape.results() / groups) * shape.count + result % shape.count;
}

}  // namespace

// Sums are in double, results in the accumulation type.
Status golden_batch_norm_moments(Stream, const GoldenBatchNormMoments& call) {
  const DType acc = accumulation(call.dtype);
  const double count = static_cast<double>(call.channels.outer * call.channels.inner);
  spoil(call.scratch, acc, call.scratch_size);
  for (int64_t result = 0; result < call.channels.results(); ++result) {
    const int64_t known = of_group(call.channels, call.groups, result);
    double sum = 0, squares = 0;
    for_channel(call.channels, result, [&](int64_t i) { sum += load(call.x, call.dtype, i); });
    double mean = sum / count, rounded = stored(acc, mean);
    bool odd = false;
    for_channel(call.channels, result, [&](int64_t i) {
      const double number = load(call.x, call.dtype, i), deviation = number - mean;
      squares += deviation * deviation;
      odd |= !std::isfinite(number);
    });
    double var = stored(acc, stored(acc, squares) / count);
    if (!std::isfinite(stored(acc, sum))) {
      rounded = mean = stored(acc, sum);
      var = odd ? NAN : INFINITY;
    }
    const double low = std::isfinite(rounded) ? mean - rounded : 0;
    store(call.mean, acc, result, rounded);
    store(call.low, acc, result, low);
    store(call.var, acc, result, var);
    const double scale = call.scale != nullptr ? load(call.scale, acc, known) : 1;
    const double bias = call.bias != nullptr ? load(call.bias, acc, known) : 0;
    const double slope = stored(acc, call.scale_factor / std::sqrt(var + call.epsilon) * scale);
    store(call.slope, acc, result, slope);
    store(call.shift, acc, result, std::isfinite(slope) ? bias - slope * low : bias);
  }
  return kSuccess;
}

Status golden_batch_norm_sums(Stream, const GoldenBatchNormSums& call) {
  const DType acc = accumulation(call.dtype);
  spoil(call.scratch, acc, call.scratch_size);
  for (int64_t result = 0; result < call.channels.results(); ++result) {
    const int64_t known = of_group(call.channels, call.groups, result);
    const double mean = load(call.mean, acc, known), low = load(call.low, acc, known);
    double sum = 0, product = 0;
    for_channel(call.channels, result, [&](int64_t i) {
      const double ct = load(call.ct, call.ct_dtype, i);
      sum += ct;
      product += (load(call.x, call.dtype, i) - mean - low) * ct;
    });
    store(call.sum, acc, result, sum);
    store(call.product, acc, result, product);
  }
  return kSuccess;
}

Status golden_batch_norm_normalise(Stream, const GoldenBatchNormNormalise& call) {
  const DType acc = accumulation(call.dtype);
  for (int64_t result = 0; result < call.channels.results(); ++result) {
    const double mean = load(call.mean, acc, result), slope = load(call.slope, acc, result);
    const double shift = load(call.shift, acc, result);
    for_channel(call.channels, result, [&](int64_t i) {
      store(call.y, call.y_dtype, i, slope * (load(call.x, call.dtype, i) - mean) + shift);
    });
  }
  return kSuccess;
}

Status load_golden_batch_norm(DType) { return kSuccess; }
Status load_golden_batch_norm_normalise(DType) { return kSuccess; }

}  // namespace syntonic
