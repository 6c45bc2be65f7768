#include "engine/map.cuh"
#include "ops/crystallize.h"
#include "ops/nearest.h"

namespace syntonic {
namespace {

// What both results have in common; A is the type of the search.
template <class Data, class A>
struct Search {
  using T = Data;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = sizeof(T) > 2 ? kCrystallizePacks : kMapPacks;
  using Loaded = Packed<T, N>;

  const T* x;
  Lattices<A> lattices;

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return load<T, N, Cache::keep>(x + start, at, vector);
  }

  __device__ void find(const Loaded& loaded, Point<A> (&point)[N]) const {
    A value[N];
    unpack(loaded, value);
    nearest(lattices, value, point);
  }
};

template <class T, class A>
struct Value : Search<T, A> {
  using Search<T, A>::N;

  AnyArray y;

  __device__ void write(const Packed<T, N>& loaded, int64_t start, const Span& at,
                        bool vector) const {
    Point<A> point[N];
    this->find(loaded, point);
    A value[N];
#pragma unroll
    for (int e = 0; e < N; ++e) value[e] = lattice_value(point[e]);
    store_any<T>(y, start, at, vector, value);
  }
};

template <class T, class A>
struct Coefficients : Search<T, A> {
  using Search<T, A>::N;

  int32_t* a;
  int32_t* b;

  __device__ void write(const Packed<T, N>& loaded, int64_t start, const Span& at,
                        bool vector) const {
    Point<A> point[N];
    this->find(loaded, point);
    Packed<int32_t, N> as, bs;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      as.word[e] = static_cast<uint32_t>(static_cast<int32_t>(point[e].a));
      bs.word[e] = static_cast<uint32_t>(static_cast<int32_t>(point[e].b));
    }
    store(a + start, at, vector, as);
    store(b + start, at, vector, bs);
  }
};

template <class T, class A>
Status run(Stream stream, const Crystallize& call) {
  const T* x = static_cast<const T*>(call.x);
  const Search<T, A> search = {x, lattices<A>(call.precision)};
  if (call.y != nullptr) {
    return launch_map(stream, Value<T, A>{search, {call.y, call.y_dtype}}, call.count,
                      all_aligned(x, static_cast<const char*>(call.y)));
  }
  return launch_map(stream, Coefficients<T, A>{search, call.a, call.b}, call.count,
                    all_aligned(x) && all_aligned(call.a, call.b));
}

template <class T, class A>
Status load_both() {
  return load_kernels(map_kernel<Value<T, A>>, map_kernel<Coefficients<T, A>>);
}

}  // namespace

Status crystallize(Stream stream, const Crystallize& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (searches_in_float(call)) return run<T, float>(stream, call);
    }
    return run<T, double>(stream, call);
  });
}

Status load_crystallize(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (const Status status = load_both<T, float>(); status != kSuccess) return status;
    }
    return load_both<T, double>();
  });
}

}  // namespace syntonic
