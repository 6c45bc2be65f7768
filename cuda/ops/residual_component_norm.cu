#include "engine/column_sums.cuh"
#include "engine/map.cuh"
#include "ops/residual_component_norm.h"

namespace syntonic {
namespace {

// A square may overflow or vanish where the norm does not. After Blue (1978) large numbers are
// scaled by `shrink` before they are squared and small ones by `grow`, and there is a sum for each
// of the three kinds, which adds to those of other blocks and devices. What lies between `small`
// and `large` is squared as it is: 2^40 squares of the greatest of it (2^60 in float64) have a sum.
template <class A>
struct Blue {
  static constexpr A large = 0x1p43f, small = 0x1p-62f, shrink = 0x1p-88f, grow = 0x1p88f;
  static constexpr A most = 0x1p86f, least = 0x1p-62f;  // a sum in which no square has been lost
};
template <>
struct Blue<double> {
  static constexpr double large = 0x1p480, small = 0x1p-480, shrink = 0x1p-600, grow = 0x1p600;
  static constexpr double most = 0x1p960, least = 0x1p-900;
};

// float32 holds every sum of squares of float16.
template <class T>
constexpr bool kAnyScale = !std::is_same_v<T, f16>;

template <class A>
struct Squares {
  A small = 0;
  A middle = 0;
  A large = 0;

  // NaN is neither large nor small.
  __device__ void add(A value) {
    using B = Blue<A>;
    const A size = value < A(0) ? -value : value;
    if (size > B::large) {
      value *= B::shrink;
      large += value * value;
    } else if (size < B::small) {
      value *= B::grow;
      small += value * value;
    } else {
      middle += value * value;
    }
  }
};

// Of this thread's share of the tiles at start, start + step, ... Not inlined, so that it takes no
// registers from the loop that all blocks run.
template <class T>
__device__ __noinline__ Squares<Acc<T>> squares_again(const T* x, int64_t start, int64_t step,
                                                      int64_t count, int tile) {
  Squares<Acc<T>> own;
  for (; start < count; start += step) {
    const int end = static_cast<int>(count - start < tile ? count - start : tile);
#pragma unroll 1
    for (int i = threadIdx.x; i < end; i += kMaxThreads) {
      own.add(static_cast<Acc<T>>(x[start + i]));
    }
  }
  return own;
}

// Each block handles tiles member, member + members, ... of its partial. It leaves three sums, for
// which it reads its numbers again if their plain sum is out of range: that is rare (but for a
// block of zeros), and costs the others one comparison.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    square_sums(const T* x, Acc<T>* sums, const Workers workers, int64_t count, bool aligned) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Sum<A>> shared;
  const Team team(kMaxThreads);
  Reducer<Sum<A>> reduce(shared, team);
  constexpr int64_t kTile = int64_t{N} * kSquarePacks * kMaxThreads;
  const int64_t partial = blockIdx.x / workers.members;
  A sum[N] = {};
  for (int64_t offset = blockIdx.x % workers.members * kTile; offset < count;
       offset += workers.members * kTile) {
    const int end = static_cast<int>(count - offset < kTile ? count - offset : kTile);
    const bool vector = aligned && end == kTile;
    Packed<T, N> packed[kSquarePacks];
#pragma unroll
    for (int k = 0; k < kSquarePacks; ++k) {
      packed[k] = load<T, N>(x + partial * count + offset,
                             span<N>(vector, k, team.size, team.rank, end), vector);
    }
#pragma unroll
    for (int k = 0; k < kSquarePacks; ++k) {
      A value[N];
      unpack(packed[k], value);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += value[e] * value[e];
    }
  }
#pragma unroll
  for (int e = 1; e < N; ++e) sum[0] += sum[e];
  const A total = reduce.all(Sum<A>{sum[0]}).value;
  A* const target = sums + int64_t{3} * blockIdx.x;
  if (team.rank == 0) target[0] = 0, target[1] = total, target[2] = 0;
  // All threads take the same branch: they all have the same bits.
  if (!kAnyScale<T> || (total >= Blue<A>::least && total <= Blue<A>::most)) return;
  const Squares<A> own = squares_again(x + partial * count, blockIdx.x % workers.members * kTile,
                                       workers.members * kTile, count, kTile);
#pragma unroll 1
  for (int kind = 0; kind < 3; ++kind) {
    const A part = kind == 0 ? own.small : kind == 1 ? own.middle : own.large;
    const A all = reduce.all(Sum<A>{part}).value;
    if (team.rank == 0) target[kind] = all;
  }
}

template <class Data>
struct Cotangent {
  using T = Data;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kMapPacks;
  using Loaded = Packed<T, N>;

  const T* x;
  const Acc<T>* first;
  const Acc<T>* second;
  T* dx;
  int64_t partials;
  int64_t count;
  bool whole;  // no pack lies in two partials

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return load<T, N, Cache::keep>(x + start, at, vector);
  }

  // x by the one and then by the other: their product may be out of range.
  __device__ Acc<T> scaled(Acc<T> value, int64_t partial) const {
    return value * first[partial] * second[partial];
  }
  __device__ int64_t partial(int64_t index) const { return partials == 1 ? 0 : index / count; }

  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    Acc<T> value[N];
    unpack(loaded, value);
    const int64_t begin = start + at.first;
    if (partials == 1 || (vector && whole)) {
      const int64_t shared = partial(begin);
#pragma unroll
      for (int e = 0; e < N; ++e) value[e] = scaled(value[e], shared);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (at.holds(e)) value[e] = scaled(value[e], partial(begin + e * at.step));
      }
    }
    store(dx + start, at, vector, pack<T>(value));
  }
};

}  // namespace

Status sum_of_squares(Stream stream, const SumOfSquares& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    if (call.partials == 0) return kSuccess;
    A* sums = static_cast<A*>(call.sums);
    const int64_t tiles = ceil_div(call.count, kVector<T> * kSquarePacks * kMaxThreads);
    const Workers workers =
        plan_workers(call.partials, std::max<int64_t>(1, tiles / kSquareTilesAlone), 1,
                     resident_blocks({0, kMaxThreads}, square_sums<T>), 3, call.scratch_size);
    // Every partial of an aligned array starts aligned only if partials are whole packs.
    const bool aligned =
        all_aligned(call.x) && (call.partials == 1 || call.count % kVector<T> == 0);
    A* target = workers.members == 1 ? sums : static_cast<A*>(call.scratch);
    const Status status =
        launch(stream, {workers.partials * workers.members, kMaxThreads}, square_sums<T>,
               static_cast<const T*>(call.x), target, workers, call.count, aligned);
    if (status != kSuccess || workers.members == 1) return status;
    return fold(stream, target, workers.partials, workers.members, 3,
                FoldTargets<A>{sums, nullptr});
  });
}

Status sum_of_squares_cotangent(Stream stream, const SumOfSquaresCotangent& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Cotangent<T> map = {static_cast<const T*>(call.x),
                              static_cast<const Acc<T>*>(call.first),
                              static_cast<const Acc<T>*>(call.second),
                              static_cast<T*>(call.dx),
                              call.partials,
                              call.count,
                              call.count % kVector<T> == 0};
    return launch_map(stream, map, call.partials * call.count, all_aligned(call.x, call.dx));
  });
}

Status load_sum_of_squares(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    return load_kernels(square_sums<T>, fold_columns<Acc<T>>, map_kernel<Cotangent<T>>);
  });
}

}  // namespace syntonic
