// Barriers in shared memory, and thread-block clusters, from compute capability 9.0 on.
//
// They order shared memory alone. The hardware barriers that stand beside them also wait for every
// global store under way and empty the L1 cache: too dear for something done once a row.
#pragma once

#include <cstdint>

namespace syntonic {

constexpr int kMaxCluster = 8;     // the portable limit
constexpr int kLargeCluster = 16;  // of kernels that ask for it, where the device can

// Tells the cluster that this block has begun, and no more: what the arrival below also does, to
// wait for the memory accesses of the whole device, would keep the block from its first loads.
__device__ inline void cluster_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ inline int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// Blocks in this cluster, 1 where there is none, and its place in the grid, which is that of a
// block where there is none: both without a division.
__device__ inline int cluster_blocks() {
  uint32_t blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

__device__ inline unsigned cluster_index() {
  uint32_t index = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return index;
}

// Writes to the same place in a block of the cluster; cluster_arrive and cluster_wait follow.
template <class M>
__device__ void store_in_block(M* place, const M& value, int block) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
#pragma unroll
  for (int i = 0; i < int(sizeof(M) / 4); ++i) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote + 4 * i),
                 "r"(reinterpret_cast<const uint32_t*>(&value)[i])
                 : "memory");
  }
#else
  *place = value;
#endif
}

// Completes a phase when `arrivals` threads have arrived and all bytes that were announced have
// come. Phases are waited for by their parity: 0, 1, 0, ... Before compute capability 9.0 it is
// the barrier of the whole block, and all the waiting is done in `wait`.
class Barrier {
 public:
  // By one thread; other threads may use the barrier after they met it.
  __device__ void init(int arrivals) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  __device__ void arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
#endif
  }

  // Arrives, and announces bytes that `send` will bring in this phase.
  __device__ void arrive_expecting(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // Also for what other blocks have sent: a wait with the scope of the cluster would empty the L1
  // cache, and orders no more on the hardware.
  __device__ void wait(int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
#else
    __syncthreads();
#endif
  }

  // Writes to the same place in another block of the cluster, and tells its barrier.
  template <int kWords>
  __device__ void send(uint32_t (&place)[kWords], const uint32_t (&word)[kWords], int block) {
#if __CUDA_ARCH__ >= 900
    const uint32_t barrier = in_block(address(), block);
    const uint32_t target = in_block(static_cast<uint32_t>(__cvta_generic_to_shared(place)), block);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
              target + 4 * i),
          "r"(word[i]), "r"(barrier)
          : "memory");
    }
#endif
  }

 private:
  __device__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }

  __device__ static uint32_t in_block(uint32_t address, int block) {
    uint32_t remote = address;
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
#endif
    return remote;
  }

  uint64_t state_;
};

}  // namespace syntonic
