// Rows of logits in double, for the doubles of the softmax operations.
#pragma once

#include <limits>
#include <vector>

#include "numbers.h"
#include "ops/syntonic_softmax.h"

namespace syntonic {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One row of planes: its elements are `inner` apart.
struct Row {
  int64_t number;
  int64_t group;
  int64_t start;
  int64_t step;
  int64_t width;

  int64_t at(int64_t i) const { return start + i * step; }
};

template <typename Body>
void for_rows(const Planes& shape, const Body& body) {
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const int64_t plane = row / shape.inner;
    body(Row{row, plane / shape.outer, plane * shape.width * shape.inner + row % shape.inner,
             shape.inner, shape.width});
  }
}

inline bool counts(const SoftmaxLogits& logits, int64_t i) {
  return logits.mask == nullptr || static_cast<const uint8_t*>(logits.mask)[i];
}

// z of a row; what does not count is -inf.
inline std::vector<double> logits_of(const SoftmaxLogits& logits, const Row& row) {
  const DType acc = accumulation(logits.dtype);
  std::vector<double> z(row.width, -kInfinity);
  for (int64_t i = 0; i < row.width; ++i) {
    if (!counts(logits, row.at(i))) continue;
    z[i] = load(logits.x, logits.dtype, row.at(i));
    if (logits.bias) z[i] += load(logits.bias, acc, row.group * row.width + i);
    if (!logits.weights) continue;
    const double weight = load(logits.weights, logits.dtype, row.at(i));
    z[i] += load(logits.scale, acc, row.group) * std::log(weight < 1e-10 ? 1e-10 : weight);
  }
  return z;
}

// The largest z and the logarithm of the sum of exp(z - max); -inf and -inf of a row in which
// nothing counts.
struct Normaliser {
  double max = -kInfinity;
  double log_sum = -kInfinity;
};

inline Normaliser normaliser_of(const SoftmaxLogits& logits, const Row& row,
                                const std::vector<double>& z) {
  Normaliser found;
  bool any = false;
  for (int64_t i = 0; i < row.width; ++i) {
    if (!counts(logits, row.at(i))) continue;
    any = true;
    if (z[i] > found.max || std::isnan(z[i])) found.max = z[i];
    if (std::isnan(found.max)) break;
  }
  if (!any) return found;
  double sum = 0;
  for (int64_t i = 0; i < row.width; ++i) {
    if (counts(logits, row.at(i))) sum += std::exp(z[i] - found.max);
  }
  found.log_sum = std::log(sum);
  return found;
}

}  // namespace syntonic
