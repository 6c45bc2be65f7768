// How a kernel is launched, and how many of its blocks a device runs at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/barrier.cuh"
#include "core/devices.h"
#include "core/types.h"

namespace syntonic {

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

// Whether a device runs a cluster at all: more blocks than the portable limit need not find room.
template <class K>
bool fits_device(const Grid& grid, K* kernel) {
  return grid.cluster <= kMaxCluster || resident_clusters(grid, kernel) > 0;
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

// Dynamic shared memory that a block of this kernel may use beside what it declares.
template <class K>
int dynamic_shared_capacity(K* kernel) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes attributes = {};
  cudaFuncGetAttributes(&attributes, kernel);
  return most - static_cast<int>(attributes.sharedSizeBytes);
}

// Loads a kernel and lets it use all the shared memory that there is.
template <class K>
Status load_with_dynamic_shared(K* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              dynamic_shared_capacity(kernel));
}

// Lets a kernel use all the shared memory, and large clusters.
template <class K>
Status load_large(K* kernel) {
  const Status status = load_with_dynamic_shared(kernel);
  if (status != kSuccess || !compiled_for_90(kernel)) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

}  // namespace syntonic
