// The elementwise engine: one pass over flat arrays, no reduction.
#pragma once

#include "core/launch.cuh"
#include "core/memory.cuh"
#include "tuning/map.h"

namespace syntonic {

// A map has a type T of the data, the number N of elements in a pack, a type `Loaded` of the
// operands of one pack in registers, the number kPacks of packs of a thread, and
//   Loaded read(int64_t start, const Span&, bool vector) const
//   void write(const Loaded&, int64_t start, const Span&, bool vector) const
// Every thread issues the loads of all its packs before it uses the first.
template <class M, bool kVectorAccess>
__device__ void map_tile(const M& map, int64_t start, int end) {
  constexpr int N = M::N;
  const int rank = static_cast<int>(threadIdx.x);
  typename M::Loaded loaded[M::kPacks];
#pragma unroll
  for (int k = 0; k < M::kPacks; ++k) {
    loaded[k] = map.read(start, span<N>(kVectorAccess, k, kMapThreads, rank, end), kVectorAccess);
  }
#pragma unroll
  for (int k = 0; k < M::kPacks; ++k) {
    map.write(loaded[k], start, span<N>(kVectorAccess, k, kMapThreads, rank, end), kVectorAccess);
  }
}

template <class M>
__global__ void __launch_bounds__(kMapThreads)
    map_kernel(const M map, int64_t count, bool aligned) {
  wait_for_launches();
  constexpr int kTile = M::N * M::kPacks * kMapThreads;
  const int64_t start = int64_t{blockIdx.x} * kTile;
  // The last tile may end within a pack.
  if (aligned && count - start >= kTile) {
    map_tile<M, true>(map, start, kTile);
  } else {
    map_tile<M, false>(map, start, count - start < kTile ? static_cast<int>(count - start) : kTile);
  }
}

template <class M>
Status launch_map(Stream stream, const M& map, int64_t count, bool aligned) {
  if (count == 0) return kSuccess;
  constexpr int kTile = M::N * M::kPacks * kMapThreads;
  return launch(stream, {ceil_div(count, kTile), kMapThreads}, map_kernel<M>, map, count, aligned);
}

}  // namespace syntonic
