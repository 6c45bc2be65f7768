// Deterministic column sums: every worker of a persistent grid keeps the sums of its own rows and
// leaves them in scratch memory, from where a second kernel folds them in a fixed order.
#pragma once

#include "engine/row_plan.cuh"
#include "tuning/channels.h"

namespace syntonic {

// Units of work: each of `partials` stretches of `rows` rows is shared by `members` workers, and no
// worker mixes stretches. Where rows begin in `phases` places of a pack, a worker goes from phase
// to phase, and what it leaves of each is a part of its own.
struct Workers {
  int64_t partials;
  int64_t rows;     // in a partial
  int64_t members;  // workers of a partial
  int phases = 1;

  // What workers leave of a partial.
  __host__ __device__ int64_t parts() const { return members + phases - 1; }
};

// How many workers may share a partial: no more than have a row for each of their teams, than keep
// the device busy, or than have room for the parts they leave, of `sums` elements each, in the
// scratch memory. None, where there is no room for one. Many are made a multiple of the phases, by
// which all rows of a team begin in the same place of a pack.
inline Workers plan_workers(int64_t partials, int64_t rows, int teams, int64_t resident,
                            int64_t sums, int64_t scratch_size, int phases = 1) {
  const int64_t room = sums == 0 ? kMaxGrid : scratch_size / (partials * sums);
  const int64_t busy = std::max<int64_t>(1, resident / partials);
  const int64_t members = std::min({room, busy, ceil_div(rows, teams)});
  if (phases == 1) return {partials, rows, std::max<int64_t>(1, members)};
  if (members * teams >= rows) return {partials, rows, members};  // a row each
  int64_t period = 1;
  while (period * teams % phases != 0) ++period;
  if (members >= 8 * period) return {partials, rows, members / period * period};
  return {partials, rows, std::min(members, room - (phases - 1)), phases};
}

// Adds up what the teams of a block hold: the first team ends up with the sums of all. `x` holds
// the values of this thread, `shared` has room for N values of each thread of the block.
template <class A, int N>
__device__ void add_teams(const Team& team, A (&x)[N], A* shared) {
  if (team.count == 1) return;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < N; ++e) shared[e * threads + thread] = x[e];
  __syncthreads();
  if (team.index != 0) return;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    for (int other = 1; other < team.count; ++other) {
      x[e] += shared[e * threads + other * team.size + thread];
    }
  }
}

// Stores the sums of a pack of columns. Those of the data are shifted against those of the sums
// where rows are no whole packs.
template <class A, int N>
__device__ void store_columns(A* row, const Span& at, bool vector, const A (&x)[N]) {
  store(row, at, vector, pack<A>(x));
}
template <class A, int N>
__device__ void store_columns(A* row, const Part& at, bool, const A (&x)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (at.holds(e)) row[at.first + e] = x[e];
  }
}

// Adds up what the teams of a block hold whose packs begin in different columns, K packs a thread:
// the sums of `width` columns are left in `shared`, from where take(column, sum) takes them.
template <class Packs, class A, int N, int K, class F>
__device__ void add_ragged_teams(const Packs& packs, const A (&x)[K][N], A* shared, F take) {
  const Team& team = packs.team;
  for (int turn = 0; turn < team.count; ++turn) {
    __syncthreads();
    if (team.index != turn) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const auto at = packs.columns(k);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (!at.holds(e)) continue;
        A& sum = shared[at.first + e - packs.begin];
        sum = turn == 0 ? x[k][e] : sum + x[k][e];
      }
    }
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < packs.width; c += static_cast<int>(blockDim.x)) {
    take(c, shared[c]);
  }
}

// Where the folded sums go: `width` columns each; absent ones are null and not in the scratch.
template <class A>
struct FoldTargets {
  A* first;
  A* second;
};

// sums[partial][member][columns] -> columns of each partial. One block for 32 columns.
template <class A>
__global__ void __launch_bounds__(kFoldColumns* kFoldLanes)
    fold_columns(const A* sums, int64_t members, int64_t width, int64_t columns,
                 FoldTargets<A> target) {
  wait_for_launches();
  __shared__ A shared[kFoldLanes][kFoldColumns];
  const int64_t tiles = (columns + kFoldColumns - 1) / kFoldColumns;
  const int64_t partial = blockIdx.x / tiles;
  const int x = threadIdx.x % kFoldColumns, lane = threadIdx.x / kFoldColumns;
  const int64_t column = blockIdx.x % tiles * kFoldColumns + x;
  A sum = 0;
  if (column < columns) {
    const A* source = sums + partial * members * columns + column;
#pragma unroll 4
    for (int64_t member = lane; member < members; member += kFoldLanes) {
      sum += source[member * columns];
    }
  }
  shared[lane][x] = sum;
  __syncthreads();
  if (lane != 0 || column >= columns) return;
  for (int other = 1; other < kFoldLanes; ++other) sum += shared[other][x];
  if (target.first && column < width) {
    target.first[partial * width + column] = sum;
  } else {
    target.second[partial * width + (target.first ? column - width : column)] = sum;
  }
}

template <class A>
Status fold(Stream stream, const A* sums, int64_t partials, int64_t members, int64_t width,
            const FoldTargets<A>& target) {
  const int64_t columns = width * ((target.first != nullptr) + (target.second != nullptr));
  const int64_t blocks = partials * ceil_div(columns, kFoldColumns);
  return launch(stream, {blocks, kFoldColumns * kFoldLanes}, fold_columns<A>, sums, members, width,
                columns, target);
}

// Launches `sum` on workers, and folds what they leave in the scratch memory where more than one
// shares a partial. sum(sums, stride) launches one kernel in which every unit of work stores its
// sums of columns, those of units being `stride` apart.
template <class A, class F>
Status gather_columns(Stream stream, const Workers& workers, int64_t width,
                      const FoldTargets<A>& target, void* scratch, F&& sum) {
  const int64_t columns = width * ((target.first != nullptr) + (target.second != nullptr));
  if (workers.parts() == 1 || columns == 0) return sum(target, width);
  A* first = static_cast<A*>(scratch);
  const FoldTargets<A> parts = {target.first ? first : nullptr,
                                target.second ? first + (target.first ? width : 0) : nullptr};
  const Status status = sum(parts, columns);
  if (status != kSuccess) return status;
  return fold(stream, first, workers.partials, workers.parts(), width, target);
}

}  // namespace syntonic
