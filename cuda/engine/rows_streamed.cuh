// Rows that are streamed: read where they lie in memory, once for each pass over them.
#pragma once

#include "engine/row_plan.cuh"
#include "engine/stretch.cuh"
#include "tuning/softmax.h"

namespace syntonic {

// Packs that a thread loads before it uses the first of them.
template <class T>
constexpr int kPacksUnderWay = sizeof(T) == 2 ? kStreamPacks16 : kStreamPacks;

// Teams for rows that are streamed: a part of a warp, or a block. A block has the number of threads
// that leaves the device the least idle, in the last turn of a row and in the last wave of blocks.
template <class T>
RowPlan plan_stream(int64_t width, int64_t rows) {
  constexpr int kLeast = kLeastStreamThreads;
  const int64_t packs = ceil_div(width, kVector<T>), threads = ceil_div(packs, kPacksUnderWay<T>);
  int team = 1;
  while (team < threads && team < kLeast) team *= 2;
  if (threads <= kLeast) return {0, kLeast, team};
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  double best = 0;
  for (int some = kLeast; some <= kStreamThreads; some += kWarp) {
    const int64_t step = int64_t{some} * kPacksUnderWay<T>;
    const int64_t resident = kResidentThreads / some * processors;
    const double busy = double(packs) / double(ceil_div(packs, step) * step) * double(rows) /
                        double(ceil_div(rows, resident) * resident);
    if (busy > best) best = busy, team = some;
  }
  return {0, team, team};
}

inline Grid grid_of_rows(const RowPlan& plan, int64_t rows) {
  const int cluster = cluster_size(plan);
  return {ceil_div(rows, teams_per_block(plan)) * cluster, plan.threads, cluster};
}

}  // namespace syntonic
