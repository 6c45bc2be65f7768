// Rows that are staged in the shared memory of a block or a cluster, and partly held in registers.
#pragma once

#include <limits>

#include "core/async_copy.cuh"
#include "engine/row_plan.cuh"
#include "tuning/softmax.h"

namespace syntonic {

// How many threads go through `packs` in turns so that the fewest are idle in the last turn: whole
// warps, from `least` to `most` threads.
inline int even_threads(int64_t packs, int least, int most) {
  int threads = least;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int some = least; some <= most; some += kWarp) {
    const int64_t padded = ceil_div(packs, some) * some;
    if (padded <= fewest) fewest = padded, threads = some;
  }
  return threads;
}

// A staged row: every thread keeps its first kHeldPacks packs in registers and stages the others in
// shared memory, as pieces. That leaves shared memory for the rows of other blocks.

// Pieces that a block stages, of a row of `packs` packs that `blocks` blocks share.
__host__ __device__ constexpr int64_t stage_pieces(int64_t packs, int blocks, int threads) {
  const int team = blocks * threads;
  const int64_t turns = (packs + team - 1) / team;
  return turns > kHeldPacks ? (turns - kHeldPacks) * threads : 0;
}

struct StagePlan {
  int blocks = 0;  // 0: it does not fit
  int threads = 0;
  size_t shared = 0;  // bytes of a block

  int team() const { return blocks * threads; }
  Grid grid(int64_t rows) const { return {rows * blocks, threads, blocks, shared}; }
};

// For rows of `row_bytes` of each of `arrays` arrays.
template <class K>
StagePlan plan_stages(int64_t row_bytes, int arrays, int most, K* kernel) {
  const int64_t pieces = row_bytes / 16;
  if (!compiled_for_90(kernel)) most = 1;
  StagePlan plan = {1};
  const auto crowded = [&](int64_t room) { return pieces * arrays > room * plan.blocks; };
  while (plan.blocks < std::min(most, kMaxCluster) && crowded(kStagePieces)) plan.blocks *= 2;
  while (plan.blocks < most && crowded(kMostPieces)) plan.blocks *= 2;
  const int64_t share = ceil_div(pieces, plan.blocks);
  // If a multiprocessor has room for few blocks, large blocks keep it busier.
  const int64_t some = share * arrays > kStagePieces + kStagePieces / 8 ? 224 : 128;
  const int least = static_cast<int>(std::min(some, ceil_div(share, kWarp) * kWarp));
  plan.threads = even_threads(share, std::max(least, kWarp), kStageThreads);
  plan.shared = sizeof(uint4) * arrays * (stage_pieces(pieces, plan.blocks, plan.threads) + kLine);
  const bool fits = plan.shared <= static_cast<size_t>(dynamic_shared_capacity(kernel));
  if (plan.blocks > kMaxCluster && (!fits || resident_clusters(plan.grid(1), kernel) == 0)) {
    return plan_stages(row_bytes, arrays, kMaxCluster, kernel);
  }
  if (!fits) plan.blocks = 0;
  return plan;
}

// Where this thread stages its packs, the first of which is at `first_pack`. A piece has the place
// in its line of shared memory that its pack has in a line of global memory.
template <class T>
__device__ uint4* stage_of(uint4* pieces, const T* first_pack) {
  return pieces + threadIdx.x + reinterpret_cast<uintptr_t>(first_pack) / 16 % kLine;
}

// Goes through the packs of this thread: calls held(pack, register) for those in registers, then
// staged(pack, piece) for the others.
template <class Held, class Staged>
__device__ void for_packs(int packs, const Team& team, Held&& held, Staged&& staged) {
  int pack = team.rank;
#pragma unroll
  for (int h = 0; h < kHeldPacks; ++h, pack += team.size) {
    if (pack < packs) held(pack, h);
  }
#pragma unroll 2
  for (int piece = 0; pack < packs; pack += team.size, piece += blockDim.x) staged(pack, piece);
}

// Starts to read a row. The staged packs are there after wait_copies; those in registers need none.
template <class T>
__device__ void fetch_packs(Packed<T, kVector<T>> (&held)[kHeldPacks], uint4* stage,
                            const T* first_pack, int packs, const Team& team) {
  constexpr int N = kVector<T>;
  for_packs(
      packs, team,
      [&](int pack, int h) { held[h] = read_pack<T, N>(first_pack + int64_t{pack} * N); },
      [&](int pack, int piece) {
        copy_async<16>(stage + piece, 1, first_pack + int64_t{pack} * N, true);
      });
  commit_copies();
}

}  // namespace syntonic
