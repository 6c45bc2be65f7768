#include "engine/channels.cuh"
#include "ops/golden_batch_norm.h"

namespace syntonic {
namespace {

template <class A>
__device__ bool finite(A x) {
  return x - x == A(0);
}

// V elements as they came from memory; one alone may be smaller than a word.
template <class T, int V>
struct Elements {
  Packed<T, V> packed;
};
template <class T>
struct Elements<T, 1> {
  T one;
};

template <int V, class T>
__device__ Elements<T, V> read_elements(const T* data, int64_t first) {
  if constexpr (V == 1) {
    return {data[first]};
  } else {
    return {load<T, V, Cache::keep>(data + first, Span{0, 1, V}, true)};
  }
}

template <int V, Cache kCache = Cache::keep, class T>
__device__ void start_elements(uint4* pieces, const T* data, int64_t first) {
  copy_async<V * sizeof(T), kCache>(pieces, kChannelThreads, data + first, true);
}

template <class T, int V>
__device__ Elements<T, V> started_elements(const uint4* pieces) {
  return {staged<T, V>(pieces, kChannelThreads)};
}

template <class T, int V, class A>
__device__ void unpack_elements(const Elements<T, V>& elements, A (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = static_cast<A>(elements.one);
  } else {
    unpack(elements.packed, x);
  }
}

template <class U>
struct MomentsOf {
  using T = U;
  using A = Acc<T>;
  using M = Moments<A>;
  using Number = A;
  struct Channel {};
  struct Turn {  // sums about a number that is near
    A about;
    A sum;
    A squares;
  };
  static constexpr int kReads = kMomentsOfChannels.reads, kStages = kMomentsOfChannels.stages;
  static constexpr int kPieces = 1;
  template <int V>
  using Raw = Elements<T, V>;

  const T* x;
  const A* scale;
  const A* bias;
  A* mean;
  A* low;
  A* var;
  A* slope;
  A* shift;
  A count;       // elements of a channel
  int64_t kept;  // elements that stay in the L2 cache
  int64_t results_per_group;
  int64_t channels;
  A epsilon;
  A scale_factor;

  template <int V>
  __device__ Raw<V> read(int64_t first) const {
    return read_elements<V>(x, first);
  }
  // What is read last stays in the L2 cache for whoever reads x next, from its beginning.
  __device__ void start(uint4* pieces, int64_t first) const {
    if (first < kept) {
      start_elements<kVector<T>>(pieces, x, first);
    } else {
      start_elements<kVector<T>, Cache::passing>(pieces, x, first);
    }
  }
  template <int V>
  __device__ Raw<V> started(const uint4* pieces) const {
    return started_elements<T, V>(pieces);
  }
  template <int V>
  __device__ void unpack(const Raw<V>& raw, A (&numbers)[V]) const {
    unpack_elements(raw, numbers);
  }

  __device__ Channel channel(int64_t, int64_t) const { return {}; }

  // About the mean so far, or about one of the first numbers: of those, no more cancels than there
  // are of them.
  __device__ Turn begin(const M& moments, A first) const {
    return {moments.count == A(0) ? first : moments.mean(), 0, 0};
  }
  __device__ void take(Turn& turn, A number, const Channel&) const {
    const A deviation = number - turn.about;
    turn.sum += deviation;
    turn.squares += deviation * deviation;
  }
  __device__ void end(M& moments, const Turn& turn, int n) const {
    if (moments.count == A(0)) moments.pivot = turn.about;
    moments.extend(static_cast<A>(n), turn.sum, turn.squares);
  }

  struct Parameters {
    A scale;
    A bias;
  };
  __device__ Parameters parameters(int64_t i) const {
    const int64_t of = i / results_per_group * channels + i % channels;
    return {scale ? scale[of] : A(1), bias ? bias[of] : A(0)};
  }
  // All lanes of a warp have the same moments.
  __device__ void store(int64_t i, const M& moments, const Parameters& parameters,
                        const Channels& shape, int lane) const {
    A rounded = moments.mean(), rest = (moments.pivot - rounded) + moments.offset;
    A variance = moments.m2 / count;
    if (!finite(rounded * count) || !finite(variance)) {
      const SumPair<A> sums = plain_sums(i, shape, lane);
      rounded = sums.first / count, rest = 0;
      variance = sums.second == A(0) ? A(INFINITY) : A(NAN);
    }
    if (lane != 0) return;
    const A steepness = scale_factor * (A(1) / sqrt(variance + epsilon)) * parameters.scale;
    mean[i] = rounded;
    low[i] = rest;
    var[i] = variance;
    slope[i] = steepness;
    shift[i] = parameters.bias - (finite(steepness) ? steepness * rest : A(0));
  }
  // The sum of a channel as it is, and how many of its numbers are not finite: what merging makes
  // of numbers beyond the range is not what their sum is. Such a channel is rare, and slow.
  __device__ SumPair<A> plain_sums(int64_t i, const Channels& shape, int lane) const {
    const int64_t partial = i / shape.count, channel = i % shape.count;
    SumPair<A> sums;
    for (int64_t n = lane; n < shape.outer * shape.inner; n += kWarp) {
      const int64_t row = (partial * shape.outer + n / shape.inner) * shape.count + channel;
      const A number = static_cast<A>(x[row * shape.inner + n % shape.inner]);
      sums.first += number;
      sums.second += finite(number) ? A(0) : A(1);
    }
    return across_lanes(sums, kWarp);
  }
};

template <class U, class Ct>
struct SumsOf {
  using T = U;
  using A = Acc<T>;
  using M = SumPair<A>;
  struct Channel {
    A mean;
    A low;
  };
  struct Number {
    A x;
    A ct;
  };
  using Turn = M;
  static constexpr ChannelTuning kTuning = sizeof(Ct) > sizeof(T) ? kSumsOfWideCotangents
                                                                  : kSumsOfChannels;
  static constexpr int kReads = kTuning.reads, kStages = kTuning.stages;
  static constexpr int kPieces = 1 + sizeof(Ct) / sizeof(T);
  template <int V>
  struct Raw {
    Elements<T, V> x;
    Elements<Ct, V> ct;
  };

  const T* x;
  const Ct* ct;
  const A* mean;
  const A* low;
  A* sum;
  A* product;
  int64_t partials_per_group;
  int64_t channels;

  template <int V>
  __device__ Raw<V> read(int64_t first) const {
    return {read_elements<V>(x, first), read_elements<V>(ct, first)};
  }
  __device__ void start(uint4* pieces, int64_t first) const {
    start_elements<kVector<T>>(pieces, x, first);
    start_elements<kVector<T>>(pieces + kChannelThreads, ct, first);
  }
  template <int V>
  __device__ Raw<V> started(const uint4* pieces) const {
    return {started_elements<T, V>(pieces), started_elements<Ct, V>(pieces + kChannelThreads)};
  }
  template <int V>
  __device__ void unpack(const Raw<V>& raw, Number (&numbers)[V]) const {
    A xs[V], cts[V];
    unpack_elements(raw.x, xs);
    unpack_elements(raw.ct, cts);
#pragma unroll
    for (int e = 0; e < V; ++e) numbers[e] = {xs[e], cts[e]};
  }

  __device__ Channel channel(int64_t partial, int64_t channel) const {
    const int64_t i = partial / partials_per_group * channels + channel;
    return {mean[i], low[i]};
  }

  __device__ Turn begin(const M& sums, const Number&) const { return sums; }
  __device__ void take(Turn& sums, const Number& number, const Channel& of) const {
    sums.first += number.ct;
    sums.second += ((number.x - of.mean) - of.low) * number.ct;
  }
  __device__ void end(M& sums, const Turn& turn, int) const { sums = turn; }

  struct Parameters {};
  __device__ Parameters parameters(int64_t) const { return {}; }
  __device__ void store(int64_t i, const M& sums, const Parameters&, const Channels&,
                        int lane) const {
    if (lane != 0) return;
    sum[i] = sums.first;
    product[i] = sums.second;
  }
};

// Elements of T that one load may bring, by the alignment of an array of them.
template <class T>
int vector_of(const T* data) {
  const auto bytes = reinterpret_cast<uintptr_t>(data);
  return static_cast<int>(
      std::min<uintptr_t>(kVector<T>, bytes == 0 ? 16 : (bytes & -bytes) / sizeof(T)));
}

template <class T, class Ct>
Status sums_of(Stream stream, const GoldenBatchNormSums& call) {
  using A = Acc<T>;
  const SumsOf<T, Ct> sums = {static_cast<const T*>(call.x),
                              static_cast<const Ct*>(call.ct),
                              static_cast<const A*>(call.mean),
                              static_cast<const A*>(call.low),
                              static_cast<A*>(call.sum),
                              static_cast<A*>(call.product),
                              call.channels.partials / call.groups,
                              call.channels.count};
  // A wider cotangent is loaded in several pieces of 16 bytes.
  const int vector =
      std::min(vector_of(sums.x), vector_of(sums.ct) == kVector<Ct> ? kVector<T> : 1);
  return reduce_channels(stream, sums, call.channels, vector, call.scratch, call.scratch_size);
}

}  // namespace

Status golden_batch_norm_moments(Stream stream, const GoldenBatchNormMoments& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const MomentsOf<T> moments = {
        static_cast<const T*>(call.x),
        static_cast<const A*>(call.scale),
        static_cast<const A*>(call.bias),
        static_cast<A*>(call.mean),
        static_cast<A*>(call.low),
        static_cast<A*>(call.var),
        static_cast<A*>(call.slope),
        static_cast<A*>(call.shift),
        static_cast<A>(call.channels.outer * call.channels.inner),
        device_attribute(cudaDevAttrL2CacheSize) / 3 / int64_t{sizeof(T)},
        call.channels.results() / call.groups,
        call.channels.count,
        static_cast<A>(call.epsilon),
        static_cast<A>(call.scale_factor),
    };
    return reduce_channels(stream, moments, call.channels, vector_of(moments.x), call.scratch,
                           call.scratch_size);
  });
}

Status golden_batch_norm_sums(Stream stream, const GoldenBatchNormSums& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return call.ct_dtype == call.dtype ? sums_of<T, T>(stream, call)
                                       : sums_of<T, Acc<T>>(stream, call);
  });
}

Status load_golden_batch_norm(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    Status status = load_channels<MomentsOf<T>>();
    if (status == kSuccess) status = load_channels<SumsOf<T, T>>();
    return status == kSuccess ? load_channels<SumsOf<T, Acc<T>>>() : status;
  });
}

}  // namespace syntonic
