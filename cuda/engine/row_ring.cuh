// The rows to come, on their way through shared memory.
#pragma once

#include "core/async_copy.cuh"
#include "engine/row_plan.cuh"

namespace syntonic {

// A copy goes at full speed only where its source and its target lie alike in lines of 128 bytes.
// Rows that begin at any 16-byte piece of a line are therefore shifted by as much in the ring, for
// which every warp, or team that is smaller, has room.
__host__ __device__ constexpr int ring_unit(int team) { return team < kWarp ? team : kWarp; }

// The distance of the pieces of one pack: the threads of the block, and the room for shifts, which
// rows of a few pieces do without.
__host__ __device__ constexpr int ring_stride(int threads, int team, int64_t row_bytes) {
  const bool shifts = row_bytes % (16 * kLine) != 0 && team >= 2 * kLine;
  return threads + (shifts ? threads / ring_unit(team) * kLine : 0);
}

// The rows that are on their way, K packs of `pieces` 16-byte pieces a thread each, in dynamic
// shared memory. A thread copies and reads only packs of its own, but these lie elsewhere for
// another row: the threads of a warp must meet before a turn is filled again.
template <int K>
struct Ring {
  uint4* base;  // of this thread
  int stride;
  int pieces;
  unsigned step;  // from row to row, by which shifts grow

  __device__ Ring(uint4* shared, int pieces, const Team& team, int64_t row_bytes)
      : stride(ring_stride(static_cast<int>(blockDim.x), team.size, row_bytes)), pieces(pieces) {
    const bool shifts = stride > static_cast<int>(blockDim.x);
    const int unit = static_cast<int>(threadIdx.x) / ring_unit(team.size);
    base = shared + threadIdx.x + (shifts ? unit * kLine : 0);
    step = shifts ? static_cast<unsigned>(row_bytes / 16 % kLine) : 0;
  }

  // The first pack of the row that takes this turn; the next one is pieces * stride further.
  __device__ uint4* packs_of(int64_t row, int turn) const {
    return base + turn * K * pieces * stride + static_cast<unsigned>(row) * step % kLine;
  }
};

// Bytes of the ring of a kernel by this plan, whose stages are cut to what fits; 0 if not even the
// two fit that a ring needs.
template <class K>
size_t fit_ring(RowPlan& plan, K* kernel, int pieces, int64_t row_bytes) {
  const int stride = ring_stride(plan.threads, plan.team, row_bytes);
  const size_t turn = sizeof(uint4) * plan.packs * pieces * stride;
  plan.stages = std::min<int>(plan.stages, dynamic_shared_capacity(kernel) / turn);
  return plan.stages < 2 ? 0 : plan.stages * turn;
}

}  // namespace syntonic
