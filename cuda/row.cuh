// The row engine: who works on which row, and how a kernel over rows is launched.
#pragma once

#include <algorithm>

#include "devices.h"
#include "reduce.cuh"
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
  bool early = false;  // whether what is known of a row is read one turn before it is needed
};

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
    return {held, step->block, team, tuning.stages, step->early};
  }
  if (threads <= most) {
    const int team = static_cast<int>(ceil_div(threads, kWarp)) * kWarp;
    const int teams = std::max(1, step->block / team);
    return {held, teams * team, team, tuning.stages, step->early};
  }
  if (!clusters) return {0, kMaxThreads, kMaxThreads};
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
