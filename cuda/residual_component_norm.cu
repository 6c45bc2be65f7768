#include "column.cuh"
#include "map.cuh"
#include "residual_component_norm.h"

namespace syntonic {
namespace {

constexpr int kPacks = 4;       // a thread and turn
constexpr int kTilesAlone = 4;  // at least for each of several workers, who cost a second launch

// Each block handles tiles member, member + members, ... of its partial.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    square_sums(const T* x, Acc<T>* sums, const Workers workers, int64_t count, bool aligned) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Sum<A>> shared;
  const Team team(kMaxThreads);
  Reducer<Sum<A>> reduce(shared, team);
  constexpr int64_t kTile = int64_t{N} * kPacks * kMaxThreads;
  const int64_t partial = blockIdx.x / workers.members;
  A sum[N] = {};
  for (int64_t offset = blockIdx.x % workers.members * kTile; offset < count;
       offset += workers.members * kTile) {
    const int end = static_cast<int>(count - offset < kTile ? count - offset : kTile);
    const bool vector = aligned && end == kTile;
    Packed<T, N> packed[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      packed[k] = load<T, N>(x + partial * count + offset,
                             span<N>(vector, k, team.size, team.rank, end), vector);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      A value[N];
      unpack(packed[k], value);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += value[e] * value[e];
    }
  }
#pragma unroll
  for (int e = 1; e < N; ++e) sum[0] += sum[e];
  const Sum<A> total = reduce.all(Sum<A>{sum[0]});
  if (team.rank == 0) sums[blockIdx.x] = total.value;
}

template <class Data>
struct Cotangent {
  using T = Data;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = 1;
  using Loaded = Packed<T, N>;

  const T* x;
  const Acc<T>* ct;
  T* dx;
  int64_t partials;
  int64_t count;
  bool whole;  // no pack lies in two partials

  __device__ Loaded read(int64_t start, const Span& at, bool vector) const {
    return load<T, N, Cache::keep>(x + start, at, vector);
  }

  __device__ Acc<T> slope(int64_t index) const { return 2 * ct[partials == 1 ? 0 : index / count]; }

  __device__ void write(const Loaded& loaded, int64_t start, const Span& at, bool vector) const {
    Acc<T> value[N];
    unpack(loaded, value);
    const int64_t first = start + at.first;
    if (partials == 1 || (vector && whole)) {
      const Acc<T> shared = slope(first);
#pragma unroll
      for (int e = 0; e < N; ++e) value[e] *= shared;
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (at.holds(e)) value[e] *= slope(first + e * at.step);
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
    const int64_t tiles = ceil_div(call.count, kVector<T> * kPacks * kMaxThreads);
    const Workers workers =
        plan_workers(call.partials, std::max<int64_t>(1, tiles / kTilesAlone), 1,
                     resident_blocks({0, kMaxThreads}, square_sums<T>), 1, call.scratch_size);
    // Every partial of an aligned array starts aligned only if partials are whole packs.
    const bool aligned =
        all_aligned(call.x) && (call.partials == 1 || call.count % kVector<T> == 0);
    A* target = workers.members == 1 ? sums : static_cast<A*>(call.scratch);
    const Status status =
        launch(stream, {workers.partials * workers.members, kMaxThreads}, square_sums<T>,
               static_cast<const T*>(call.x), target, workers, call.count, aligned);
    if (status != kSuccess || workers.members == 1) return status;
    return fold(stream, target, workers.partials, workers.members, 1,
                FoldTargets<A>{sums, nullptr});
  });
}

Status sum_of_squares_cotangent(Stream stream, const SumOfSquaresCotangent& call) {
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Cotangent<T> map = {static_cast<const T*>(call.x),
                              static_cast<const Acc<T>*>(call.ct),
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
