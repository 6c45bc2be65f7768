// Who works on which row.
#pragma once

#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "tuning/rows.h"

namespace syntonic {

// How rows are spread over threads. A row that fits is read once and held in registers or, on its
// way through a ring of `stages` rows, in shared memory, `packs` packs a thread (the kernel's
// template parameter); packs = 0 stands for rows too wide even for a cluster, which are read a
// second time.
struct RowPlan {
  int packs = 0;
  int threads = 0;     // in a block
  int team = 0;        // that share a row; more than `threads`: team / threads blocks, a cluster
  int stages = 0;      // 0: registers
  int rows = 1;        // that a turn of the ring takes
  bool early = false;  // whether what is known of a row is read one turn before it is needed
};

// `kernel` stands for all kernels of the operation when it is asked for clusters.
template <class K>
RowPlan plan_rows(int64_t width, int vector, K* kernel, const RowTuning& tuning) {
  const int64_t packs = ceil_div(width, vector);
  const RowTuning::Step* step = tuning.step;
  while (step->upto != 0 && packs > step->upto) ++step;
  const int held = step->packs;
  const int64_t threads = ceil_div(packs + step->more, held);
  const bool clusters = compiled_for_90(kernel);
  const int most = clusters ? step->most : kMaxThreads;
  if (threads <= kWarp) {
    int team = 1;
    while (team < threads) team *= 2;
    return {held, step->block, team, step->stages, step->rows, step->early};
  }
  if (threads <= most) {
    const int team = static_cast<int>(ceil_div(threads, kWarp)) * kWarp;
    const int teams = std::max(1, step->block / team);
    return {held, teams * team, team, step->stages, step->rows, step->early};
  }
  if (!clusters) return {0, kMaxThreads, kMaxThreads};
  if (threads > most * step->cluster) return {0, kMaxThreads, kMaxThreads * kMaxCluster};
  int blocks = 2;
  while (threads > blocks * most) blocks *= 2;
  const int block = static_cast<int>(ceil_div(ceil_div(threads, blocks), kWarp)) * kWarp;
  return {held, block, block * blocks, step->stages, step->rows, step->early};
}

// Blocks in a cluster, 1 where there is none.
inline int cluster_size(const RowPlan& plan) { return std::max(1, plan.team / plan.threads); }
inline int teams_per_block(const RowPlan& plan) { return std::max(1, plan.threads / plan.team); }

}  // namespace syntonic
