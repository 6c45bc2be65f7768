// Reductions over a team: the threads that share a row, be it a part of a warp, some warps of a
// block, or a cluster of blocks. One barrier each, no atomics, a fixed order of combination.
#pragma once

#include "pack.cuh"

namespace syntonic {

// Good to two units in the last place, which is enough for weights that sum to one and for a mean
// that a second pass corrects, at a fraction of the instructions of an exact division.
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
__device__ inline double quotient(double a, double b) { return a / b; }

// ---- monoids: an identity, which fills tails and idle lanes, and an associative merge, which may
// commute to the last bit ----

template <class A>
struct SumPair {
  static constexpr bool kCommutes = true;
  A first = 0;
  A second = 0;

  __device__ static SumPair merge(const SumPair& a, const SumPair& b) {
    return {a.first + b.first, a.second + b.second};
  }
};

// Number, mean and sum of squared deviations from the mean; merged after Chan, Golub and LeVeque
// (1983). Never E[x^2] - E[x]^2, which cancels where the mean is large beside the deviation. For
// the same reason the mean is held as the unevaluated sum pivot + offset: the rounding of a mean
// near 10^4 would show in the deviations of merged means.
template <class A>
struct Moments {
  static constexpr bool kCommutes = false;
  A count = 0;
  A pivot = 0;
  A offset = 0;
  A m2 = 0;

  __device__ A mean() const { return pivot + offset; }
  __device__ A variance() const { return m2 / count; }

  __device__ static Moments merge(const Moments& a, const Moments& b) {
    if (a.count == A(0)) return b;
    const A count = a.count + b.count;
    const A share = quotient(b.count, count);
    const A delta = (b.pivot - a.pivot) + (b.offset - a.offset);
    return {count, a.pivot, a.offset + delta * share,
            a.m2 + b.m2 + delta * delta * (a.count * share)};
  }
};

// The moments of those of the N elements of each of K packs for which valid(k, e) holds: two
// passes, the second correcting the rounding of the first mean.
template <class A, int K, int N, class Valid>
__device__ Moments<A> moments_of(const A (&x)[K][N], Valid valid) {
  int count = 0;
  A sum = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (valid(k, e)) ++count, sum += x[k][e];
    }
  }
  if (count == 0) return {};
  const A mean = quotient(sum, A(count));
  A error = 0, m2 = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const A deviation = valid(k, e) ? x[k][e] - mean : A(0);
      error += deviation;
      m2 += deviation * deviation;
    }
  }
  const A correction = quotient(error, A(count));
  return {static_cast<A>(count), mean, correction, m2 - correction * error};
}

// ---- thread-block clusters, from compute capability 9.0 on ----

constexpr int kMaxCluster = 8;  // the portable limit

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

// A barrier of the block, or of its cluster, in two halves. A block launched without a cluster is
// one of its own. Before compute capability 9.0 all the waiting is done in the second half.
__device__ inline void split_arrive() { cluster_arrive(); }

__device__ inline void split_wait() {
#if __CUDA_ARCH__ >= 900
  cluster_wait();
#else
  __syncthreads();
#endif
}

// The address of the same shared variable in another block of the cluster.
template <class P>
__device__ P* in_block(P* shared, int block) {
#if __CUDA_ARCH__ >= 900
  P* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(shared), "r"(block));
  return remote;
#else
  return shared;
#endif
}

// ---- teams ----

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // in a block of any kernel that reduces
constexpr int kMaxWarps = kMaxThreads / kWarp;

// This thread's place. A team has a power of two of at most 32 threads, or a multiple of 32 that
// divides the block, or all the threads of a cluster; its size is known at run time only.
struct Team {
  int size;
  int rank;    // of this thread in its team
  int count;   // teams in the block
  int index;   // of this thread's team in the block
  int blocks;  // that share the team

  __device__ explicit Team(int size) : size(size) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    if (size > threads) {
      blocks = size / threads;
      count = 1;
      index = 0;
      rank = cluster_rank() * threads + thread;
    } else {
      blocks = 1;
      count = threads / size;
      index = thread / size;
      rank = thread % size;
    }
  }
};

// Combines the values of groups of `lanes` neighbouring lanes, a power of two; every lane gets the
// same bits, because both partners merge in the same order.
template <class M>
__device__ M across_lanes(M value, int lanes) {
  constexpr int kWords = sizeof(M) / 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if (step >= lanes) break;
    M other;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint32_t*>(&other)[i] =
          __shfl_xor_sync(0xffffffffu, reinterpret_cast<const uint32_t*>(&value)[i], step);
    }
    if constexpr (M::kCommutes) {
      value = M::merge(value, other);
    } else {
      value = lane & step ? M::merge(other, value) : M::merge(value, other);
    }
  }
  return value;
}

// What the warps of a block, and of its cluster, leave for each other. Two halves take turns, so
// that one barrier a reduction is enough: a warp may enter the next reduction while a slower one
// still reads the results of this one, but not the one after.
template <class M>
struct Exchange {
  struct Entry {
    uint32_t word[sizeof(M) / 4];
  };
  Entry entry[2][kMaxCluster][kMaxWarps];
};

// A reduction in two halves: between `post` and `collect` a thread may do other work while slower
// warps, or other blocks of the cluster, catch up. All threads of the block (of the cluster) must
// call each of them together.
template <class M>
class Reducer {
 public:
  __device__ Reducer(Exchange<M>& shared, const Team& team) : shared_(shared), team_(team) {
    // No block may write to a peer that has not started.
    if (team.blocks > 1) cluster_arrive();
  }

  // A block whose peers wait for it to start must not leave unmet.
  __device__ ~Reducer() {
    if (team_.blocks > 1 && !met_) cluster_wait();
  }

  __device__ void post(const M& value) {
    own_ = across_lanes(value, team_.size);
    if (team_.size <= kWarp) return;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (team_.blocks > 1) {
      if (!met_) cluster_wait(), met_ = true;
      if (lane < team_.blocks) {
        put(*in_block(&shared_.entry[half_][cluster_rank()][warp], lane), own_);
      }
    } else if (lane == 0) {
      put(shared_.entry[half_][0][warp], own_);
    }
    split_arrive();
  }

  __device__ M collect() {
    if (team_.size <= kWarp) return own_;
    split_wait();
    const int warps = team_.size / kWarp / team_.blocks;
    const int slot = static_cast<int>(threadIdx.x) % kMaxWarps;  // both half-warps do the same
    M merged = {};
    for (int block = 0; block < team_.blocks; ++block) {
      if (slot < warps) {
        merged = M::merge(merged, get(shared_.entry[half_][block][team_.index * warps + slot]));
      }
    }
    half_ ^= 1;
    return across_lanes(merged, kMaxWarps);
  }

  // Both at once.
  __device__ M all(const M& value) {
    post(value);
    return collect();
  }

 private:
  using Entry = typename Exchange<M>::Entry;

  __device__ static void put(Entry& entry, const M& value) {
#pragma unroll
    for (int i = 0; i < int(sizeof(M) / 4); ++i) {
      entry.word[i] = reinterpret_cast<const uint32_t*>(&value)[i];
    }
  }

  __device__ static M get(const Entry& entry) {
    M value;
#pragma unroll
    for (int i = 0; i < int(sizeof(M) / 4); ++i) {
      reinterpret_cast<uint32_t*>(&value)[i] = entry.word[i];
    }
    return value;
  }

  Exchange<M>& shared_;
  const Team& team_;
  M own_ = {};
  int half_ = 0;
  bool met_ = false;
};

}  // namespace syntonic
