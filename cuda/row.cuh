// The row engine: who works on which row, and how a kernel over rows is launched.
#pragma once

#include <algorithm>

#include "devices.h"
#include "reduce.cuh"

namespace syntonic {

// How rows are spread over threads. A row that fits is read once and held in registers or, on its
// way through a ring of `stages` rows, in shared memory, `packs` packs a thread (the kernel's
// template parameter); packs = 0 stands for rows too wide even for a cluster, which are read a
// second time.
struct RowPlan {
  int packs;
  int threads;  // in a block
  int team;     // threads that share a row; more than `threads`: a cluster of team / threads blocks
  int stages = 0;      // 0: registers
  bool early = false;  // whether what is known of a row is read one turn before it is needed
};

struct RowTuning {
  struct Step {
    int64_t upto = 0;  // packs in a row
    int packs = 0;     // a thread
    int block = 128;   // threads that a block of smaller teams is filled up to
    int more = 0;      // packs that a row may touch where it does not begin one
    bool early = false;
    int most = kMaxThreads;  // threads in a block
  };
  Step step[7];           // for vector access; the last one holds for all wider rows
  Step unaligned[2];      // for any other
  int unaligned_threads;  // the most in a block
  int stages = 0;         // rows on their way to a team at any time
};

// Every tuning number of the row kernels: found by measurement on an H100. In the cotangent the
// wait for a late number keeps the reads of memory apart from the writes, which is worth more than
// the wait costs, except where blocks have too few threads to make it up.
constexpr RowTuning kForwardTuning = {
    {{32, 2}, {2048, 4}, {4096, 4, 128, 0, false, 256}, {16384, 4}, {0, 8}},
    {{256, 2}, {0, 4, 128, 1}},
    256};
constexpr RowTuning kCotangentTuning = {{{384, 1},
                                         {512, 2, 512},
                                         {640, 2, 512, 0, true},
                                         {1024, 2, 512},
                                         {1280, 2, 512, 0, true},
                                         {8192, 2, 512},
                                         {0, 4, 512}},
                                        {{0, 2, 256}},
                                        kMaxThreads,
                                        3};
// Kernels for few packs a thread are compiled for blocks of at most this size, so that more of
// them fit on a multiprocessor at once.
constexpr int kFewThreads = 384;
constexpr int64_t kMaxGrid = 0x7fffffff;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Whether the code of this kernel that the device runs was compiled for 9.0 or later, with clusters
// and waits for launches in it, which does not follow from the device alone: it may run the PTX of
// an older architecture. That takes the driver a microsecond to say, and every launch asks.
template <class K>
bool compiled_for_90(K* kernel) {
  static DeviceSet newer, older;  // all kernels of a type K are compiled for the same architectures
  int device = 0;
  cudaFuncAttributes attributes;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (newer.has(device)) return true;
  if (older.has(device)) return false;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
  (attributes.ptxVersion >= 90 ? newer : older).add(device);
  return attributes.ptxVersion >= 90;
}

// `kernel` stands for all kernels of the operation when it is asked for clusters.
template <class K>
RowPlan plan_rows(int64_t width, int vector, bool aligned, K* kernel, const RowTuning& tuning) {
  const int64_t packs = ceil_div(width, vector);
  const RowTuning::Step* step = aligned ? tuning.step : tuning.unaligned;
  while (step->upto != 0 && packs > step->upto) ++step;
  const int held = step->packs;
  const int64_t threads = ceil_div(packs + step->more, held);
  const int most = aligned ? step->most : tuning.unaligned_threads;
  if (threads <= kWarp) {
    int team = 1;
    while (team < threads) team *= 2;
    return {held, step->block, team, tuning.stages, step->early};
  }
  if (threads <= most) {
    const int team = static_cast<int>(ceil_div(threads, kWarp)) * kWarp;
    const int teams = std::max(1, step->block / team);
    return {held, teams * team, team, tuning.stages, step->early};
  }
  if (!compiled_for_90(kernel)) return {0, kMaxThreads, kMaxThreads};
  if (threads > most * kMaxCluster) return {0, kMaxThreads, kMaxThreads * kMaxCluster};
  int blocks = 2;
  while (threads > blocks * most) blocks *= 2;
  const int block = static_cast<int>(ceil_div(ceil_div(threads, blocks), kWarp)) * kWarp;
  return {held, block, block * blocks, tuning.stages, step->early};
}

// Blocks in a cluster, 1 where there is none.
inline int cluster_size(const RowPlan& plan) { return std::max(1, plan.team / plan.threads); }
inline int teams_per_block(const RowPlan& plan) { return std::max(1, plan.threads / plan.team); }

struct Grid {
  int64_t blocks;
  int threads;
  int cluster = 1;
  size_t shared = 0;  // bytes of dynamic shared memory
};

// Waits until what was launched before this kernel is done and its results are there. Every kernel
// does so first, for it is launched when the last blocks before it end, and not when all they wrote
// has arrived: that hides most of the launch.
__device__ inline void wait_for_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether launches that overlap can also be captured into a CUDA graph, as XLA does.
inline bool captures_overlapping_launches() {
  static const bool captures = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  return captures;
}

// How a kernel is launched; it points into itself.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  template <class K>
  Launch(const Grid& grid, K* kernel) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared;
    config.attrs = attributes;
    if (grid.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    if (compiled_for_90(kernel) && captures_overlapping_launches()) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Launch(const Launch&) = delete;
};

template <class... P, class... Q>
Status launch(Stream stream, const Grid& grid, void (*kernel)(P...), Q&&... arguments) {
  if (grid.blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  Launch prepared(grid, kernel);
  prepared.config.stream = stream;
  // Not cudaGetLastError, which is also that of an earlier call, reported before or of no concern.
  return cudaLaunchKernelEx(&prepared.config, kernel, P(arguments)...);
}

// Makes the driver load these kernels onto the current device now rather than at first launch.
template <class... K>
Status load_kernels(K*... kernels) {
  cudaFuncAttributes attributes;
  Status status = kSuccess;
  ((status = status == kSuccess ? cudaFuncGetAttributes(&attributes, kernels) : status), ...);
  return status;
}

// How many clusters of a kernel the whole device runs at once.
template <class K>
int resident_clusters(const Grid& grid, K* kernel) {
  int count = 0;
  Grid one = grid;
  one.blocks = grid.cluster;
  const Launch prepared(one, kernel);
  cudaOccupancyMaxActiveClusters(&count, kernel, &prepared.config);
  return count;
}

// How many blocks: the grid of a persistent kernel.
template <class K>
int64_t resident_blocks(const Grid& grid, K* kernel) {
  int count = 0;
  if (grid.cluster > 1) {
    count = resident_clusters(grid, kernel) * grid.cluster;
  } else {
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, grid.threads, grid.shared);
    count *= device_attribute(cudaDevAttrMultiProcessorCount);
  }
  return std::max(count, grid.cluster);
}

}  // namespace syntonic
