#include "ops/residual_component_norm.h"

#include "numbers.h"

namespace syntonic {

// The sums are those of the kernel, which may also leave to the middle one what fits there. They
// are taken where every square fits.
Status sum_of_squares(Stream, const SumOfSquares& call) {
  const DType acc = accumulation(call.dtype);
  const bool wide = acc == DType::f64;
  const long double large = std::ldexp(1.0L, wide ? 480 : 43);
  const long double small = std::ldexp(1.0L, wide ? -480 : -62);
  const int power = wide ? 600 : 88;
  spoil(call.scratch, acc, call.scratch_size);
  for (int64_t partial = 0; partial < call.partials; ++partial) {
    long double sums[3] = {};
    for (int64_t i = partial * call.count; i < (partial + 1) * call.count; ++i) {
      const long double x = load(call.x, call.dtype, i);
      const int kind = std::fabs(x) > large ? 2 : std::fabs(x) < small ? 0 : 1;
      const long double scaled = std::ldexp(x, (1 - kind) * power);
      sums[kind] += scaled * scaled;
    }
    for (int kind = 0; kind < 3; ++kind) {
      store(call.sums, acc, 3 * partial + kind, static_cast<double>(sums[kind]));
    }
  }
  return kSuccess;
}

Status sum_of_squares_cotangent(Stream, const SumOfSquaresCotangent& call) {
  const DType acc = accumulation(call.dtype);
  for (int64_t i = 0; i < call.partials * call.count; ++i) {
    const double first = load(call.first, acc, i / call.count);
    const double second = load(call.second, acc, i / call.count);
    store(call.dx, call.dtype, i, load(call.x, call.dtype, i) * first * second);
  }
  return kSuccess;
}

Status load_sum_of_squares(DType) { return kSuccess; }

}  // namespace syntonic
