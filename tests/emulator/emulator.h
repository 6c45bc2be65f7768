// CUDA kernels on the CPU, as slow as can be: the kernels of cuda/ are compiled as C++ against this
// in place of CUDA's own headers, and every launch runs its threads as fibers, one after the other,
// which give way where they must wait for each other. A device of compute capability 7.5: clusters,
// background copies and barriers in shared memory are left to a real one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block at a time: what its threads share is what calls of the same OS thread share.
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Runs `thread` on every thread of every block.
void launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& thread);
void* dynamic_shared();
void meet_block();
void meet_warp();
// Between these and meet_warp, the value of every lane of the warp is there for all of them.
void offer(uint32_t value);
uint32_t offered(int lane);

}  // namespace emulator

inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp() { emulator::meet_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint32_t word[sizeof(T) / 4];
  std::memcpy(word, &value, sizeof(T));
  for (uint32_t& w : word) {
    emulator::offer(w);
    w = emulator::offered(lane & 31);
    emulator::meet_warp();
  }
  std::memcpy(&value, word, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x) ^ lanes);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned bits = 0;
  emulator::offer(value);
  for (int lane = 0; lane < 32; ++lane) bits |= emulator::offered(lane) << lane;
  emulator::meet_warp();
  return bits;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

// ---- memory and numbers ----

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline size_t __cvta_generic_to_shared(const void* address) {
  return reinterpret_cast<size_t>(address);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline double __hiloint2double(int high, int low) {
  return bits_as<double>(uint64_t{static_cast<uint32_t>(high)} << 32 | static_cast<uint32_t>(low));
}
inline int __double2loint(double x) { return static_cast<int>(bits_as<uint64_t>(x)); }
inline int __double2hiint(double x) { return static_cast<int>(bits_as<uint64_t>(x) >> 32); }
inline float __fdividef(float a, float b) { return a / b; }
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float fma(float x, float y, float z) { return std::fma(x, y, z); }
using std::max;
using std::min;

// A 16-bit type, by the conversions of numbers.h.
template <double (*from)(uint16_t), uint16_t (*to)(double)>
struct Half {
  uint16_t bits;

  Half() = default;
  explicit Half(double x) : bits(to(x)) {}
  operator float() const { return static_cast<float>(from(bits)); }
};
template <class H>
struct Pair {
  H x, y;
};

using __half = Half<syntonic::from_f16, syntonic::to_f16>;
using __half2 = Pair<__half>;
using __nv_bfloat16 = Half<syntonic::from_bf16, syntonic::to_bf16>;
using __nv_bfloat162 = Pair<__nv_bfloat16>;

inline __half __ushort_as_half(unsigned short bits) { return bits_as<__half>(bits); }
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __double2half(double x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __double2bfloat16(double x) { return __nv_bfloat16(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}

// ---- the runtime ----

constexpr int cudaSuccess = 0;
constexpr int cudaErrorInvalidValue = 1;
constexpr int cudaErrorInvalidConfiguration = 9;
constexpr int cudaLaunchAttributeClusterDimension = 4;
constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 6;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int cudaFuncAttributeNonPortableClusterSizeAllowed = 13;
// Few, so that the workers of a persistent grid have several rows each.
enum cudaDeviceAttr {  // their values too
  cudaDevAttrMultiProcessorCount = 3,
  cudaDevAttrL2CacheSize = 4 << 10,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 64 << 10,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes = 4 << 10;
  int ptxVersion = 75;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  syntonic::Stream stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... P, class... Q>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), Q&&... arguments) {
  if (config->numAttrs != 0) return cudaErrorInvalidConfiguration;
  emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                   [&] { kernel(arguments...); });
  return cudaSuccess;
}
inline int cudaDriverGetVersion(int* version) { return *version = 12030, cudaSuccess; }
inline int cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute, cudaSuccess;
}
template <class K>
int cudaFuncGetAttributes(cudaFuncAttributes* attributes, K*) {
  return *attributes = {}, cudaSuccess;
}
template <class K>
int cudaFuncSetAttribute(K*, int, int) {
  return cudaSuccess;
}
template <class K>
int cudaOccupancyMaxActiveClusters(int* count, K*, const cudaLaunchConfig_t*) {
  return *count = 0, cudaSuccess;
}
template <class K>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, K*, int, size_t) {
  return *count = 2, cudaSuccess;
}
inline int cudaMemsetAsync(void* data, int value, size_t bytes, syntonic::Stream) {
  return std::memset(data, value, bytes), cudaSuccess;
}
