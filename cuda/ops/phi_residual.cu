#include "core/activation.cuh"
#include "core/golden.cuh"
#include "engine/map.cuh"
#include "ops/phi_residual.h"

namespace syntonic {
namespace {

// Packs of 8 bytes are 1 % faster than those of 16, but not with the instructions of a gelu.
template <class Data, bool kHalfPacks>
struct Forward {
  using T = Data;
  using A = Acc<T>;
  static constexpr int N = kHalfPacks && sizeof(T) < 8 ? kVector<T> / 2 : kVector<T>;
  static constexpr int kPacks = kMapPacks;
  struct Loaded {
    Packed<T, N> identity;
    Packed<T, N> residual;
  };

  const T* identity;
  const T* residual;
  AnyArray y;
  T* z;
  A sum_scale;
  A residual_scale;
  GoldenSum<A> straight_sum;  // the same two
  Activation activation;

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return {load<T, N, Cache::keep>(identity + start, at, vector),
            load<T, N, Cache::keep>(residual + start, at, vector)};
  }

  // The activation sees the sum before it is rounded.
  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    A i[N], r[N];
    unpack(loaded.identity, i);
    unpack(loaded.residual, r);
    if (kHalfPacks) {
      straight_sum(i, r);
    } else {
      golden_sum(i, r, sum_scale, residual_scale);
    }
    if (z) store(z + start, at, vector, pack<T>(i));
    if (activation != Activation::none) {
#pragma unroll
      for (int e = 0; e < N; ++e) i[e] = activate(activation, i[e]);
    }
    store_any<T>(y, start, at, vector, i);
  }
};

// Where the gradients of the branches go; null where one is not asked for.
template <class T>
struct Gradients {
  static constexpr int N = kVector<T>;

  T* d_identity;
  T* d_residual;
  Acc<T> identity_scale;
  Acc<T> residual_scale;

  explicit Gradients(const PhiResidualCotangent& call)
      : d_identity(static_cast<T*>(call.d_identity)),
        d_residual(static_cast<T*>(call.d_residual)),
        identity_scale(static_cast<Acc<T>>(call.identity_scale)),
        residual_scale(static_cast<Acc<T>>(call.residual_scale)) {}

  __device__ void write(int64_t start, const Span& at, bool vector, const Acc<T> (&g)[N]) const {
    Acc<T> x[N];
    if (d_identity) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = identity_scale * g[e];
      store(d_identity + start, at, vector, pack<T>(x));
    }
    if (d_residual) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = residual_scale * g[e];
      store(d_residual + start, at, vector, pack<T>(x));
    }
  }
};

template <class Data>
struct Cotangent {
  using T = Data;
  using A = Acc<T>;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kMapPacks;
  struct Loaded {
    AnyPacked<A, N> saved;
    AnyPacked<A, N> ct;
  };

  AnyArray saved;  // z, or for relu y
  AnyArray ct;
  Gradients<T> gradients;
  Activation activation;

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return {load_any<A, N>(saved, start, at, vector), load_any<A, N>(ct, start, at, vector)};
  }

  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    A x[N], g[N];
    unpack_any(loaded.saved, saved.dtype, x);
    unpack_any(loaded.ct, ct.dtype, g);
#pragma unroll
    for (int e = 0; e < N; ++e) g[e] = pull_back(activation, x[e], g[e]);
    gradients.write(start, at, vector, g);
  }
};

// Without an activation, where nothing was saved.
template <class Data>
struct PlainCotangent {
  using T = Data;
  using A = Acc<T>;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kMapPacks;
  using Loaded = AnyPacked<A, N>;

  AnyArray ct;
  Gradients<T> gradients;

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return load_any<A, N>(ct, start, at, vector);
  }

  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    A g[N];
    unpack_any(loaded, ct.dtype, g);
    gradients.write(start, at, vector, g);
  }
};

template <class T, bool kHalfPacks>
Status forward(Stream stream, const PhiResidual& call) {
  const Forward<T, kHalfPacks> map = {static_cast<const T*>(call.identity),
                                      static_cast<const T*>(call.residual),
                                      {call.y, call.y_dtype},
                                      static_cast<T*>(call.z),
                                      static_cast<Acc<T>>(call.sum_scale),
                                      static_cast<Acc<T>>(call.residual_scale),
                                      {call.sum_scale, call.residual_scale},
                                      call.activation};
  return launch_map(stream, map, call.count,
                    all_aligned(call.identity, call.residual, call.y, call.z));
}

}  // namespace

Status phi_residual(Stream stream, const PhiResidual& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool cheap = call.activation == Activation::none || call.activation == Activation::relu;
    return cheap ? forward<T, true>(stream, call) : forward<T, false>(stream, call);
  });
}

Status phi_residual_cotangent(Stream stream, const PhiResidualCotangent& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const AnyArray saved = {const_cast<void*>(call.saved), call.saved_dtype};
    const AnyArray ct = {const_cast<void*>(call.ct), call.y_dtype};
    const Gradients<T> gradients(call);
    const bool aligned = all_aligned(call.saved, call.ct, call.d_identity, call.d_residual);
    if (call.activation == Activation::none) {
      return launch_map(stream, PlainCotangent<T>{ct, gradients}, call.count, aligned);
    }
    return launch_map(stream, Cotangent<T>{saved, ct, gradients, call.activation}, call.count,
                      aligned);
  });
}

Status load_phi_residual(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    return load_kernels(map_kernel<Forward<T, true>>, map_kernel<Forward<T, false>>,
                        map_kernel<Cotangent<T>>, map_kernel<PlainCotangent<T>>);
  });
}

}  // namespace syntonic
