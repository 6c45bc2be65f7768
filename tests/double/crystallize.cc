#include "ops/crystallize.h"

#include "numbers.h"
#include "ops/nearest.h"

namespace syntonic {
namespace {

// As in the kernel: `A` is the type of the search.
template <typename A>
void run(const Crystallize& call) {
  const Lattices<A> points = lattices<A>(call.precision);
  for (int64_t i = 0; i < call.count; ++i) {
    const A x[1] = {static_cast<A>(load(call.x, call.dtype, i))};
    Point<A> point[1];
    nearest(points, x, point);
    if (call.y != nullptr) {
      store(call.y, call.y_dtype, i, lattice_value(point[0]));
    } else {
      call.a[i] = static_cast<int32_t>(point[0].a);
      call.b[i] = static_cast<int32_t>(point[0].b);
    }
  }
}

}  // namespace

Status crystallize(Stream, const Crystallize& call) {
  if (searches_in_float(call)) {
    run<float>(call);
  } else {
    run<double>(call);
  }
  return kSuccess;
}

Status load_crystallize(DType) { return kSuccess; }

}  // namespace syntonic
