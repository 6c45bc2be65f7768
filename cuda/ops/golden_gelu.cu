#include "core/activation.cuh"
#include "engine/map.cuh"
#include "ops/golden_gelu.h"

namespace syntonic {
namespace {

template <class Data>
struct Forward {
  using T = Data;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kMapPacks;
  using Loaded = Packed<T, N>;

  const T* x;
  AnyArray y;

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return load<T, N, Cache::keep>(x + start, at, vector);
  }

  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    Acc<T> value[N];
    unpack(loaded, value);
#pragma unroll
    for (int e = 0; e < N; ++e) value[e] = golden_gelu_value(value[e]);
    store_any<T>(y, start, at, vector, value);
  }
};

template <class Data>
struct Cotangent {
  using T = Data;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kMapPacks;
  struct Loaded {
    Packed<T, N> x;
    AnyPacked<Acc<T>, N> ct;
  };

  const T* x;
  AnyArray ct;
  T* dx;

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return {load<T, N, Cache::keep>(x + start, at, vector),
            load_any<Acc<T>, N>(ct, start, at, vector)};
  }

  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    Acc<T> value[N], cotangent[N];
    unpack(loaded.x, value);
    unpack_any(loaded.ct, ct.dtype, cotangent);
#pragma unroll
    for (int e = 0; e < N; ++e) value[e] = golden_gelu_slope(value[e]) * cotangent[e];
    store(dx + start, at, vector, pack<T>(value));
  }
};

}  // namespace

Status golden_gelu(Stream stream, const GoldenGelu& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_map(stream, Forward<T>{static_cast<const T*>(call.x), {call.y, call.y_dtype}},
                      call.count, all_aligned(call.x, call.y));
  });
}

Status golden_gelu_cotangent(Stream stream, const GoldenGeluCotangent& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Cotangent<T> map = {static_cast<const T*>(call.x),
                              {const_cast<void*>(call.ct), call.y_dtype},
                              static_cast<T*>(call.dx)};
    return launch_map(stream, map, call.count, all_aligned(call.x, call.ct, call.dx));
  });
}

Status load_golden_gelu(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    return load_kernels(map_kernel<Forward<T>>, map_kernel<Cotangent<T>>);
  });
}

}  // namespace syntonic
