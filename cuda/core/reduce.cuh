// Reductions over a team: the threads that share a row, be it a part of a warp, some warps of a
// block, or a cluster of blocks. One barrier each, no atomics, a fixed order of combination.
#pragma once

#include <limits>

#include "core/barrier.cuh"
#include "core/memory.cuh"

namespace syntonic {

// Good to two units in the last place, which is enough for weights that sum to one and for a mean
// that a second pass corrects, at a fraction of the instructions of an exact division.
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
__device__ inline double quotient(double a, double b) { return a / b; }

// Of a sum of squares, what is left without a smaller one: infinity, where it has overflowed.
template <class A>
constexpr A kLargest = std::numeric_limits<A>::max();
template <class A>
__device__ A less(A squares, A part) {
  return squares > kLargest<A> ? squares : squares - part;
}

// ---- monoids: an identity, which fills tails and idle lanes, and an associative merge, which also
// commutes to the last bit unless across_lanes is overloaded for it ----

template <class A>
struct Sum {
  A value = 0;

  __device__ static Sum merge(const Sum& a, const Sum& b) { return {a.value + b.value}; }
};

template <class A>
struct alignas(2 * sizeof(A)) SumPair {  // read and written at once
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
struct alignas(16) Moments {
  A count = 0;
  A pivot = 0;
  A offset = 0;
  A m2 = 0;

  __device__ A mean() const { return pivot + offset; }
  __device__ A variance() const { return m2 / count; }

  // Takes in n more numbers by their sum and their sum of squares about mean(), after Welford
  // (1962) for several at once. The square of the sum is at most n times the sum of squares: the
  // difference keeps at least count / (count + n) of it, and nothing cancels.
  __device__ void extend(A n, A sum, A squares) {
    const A about = mean();
    const A rest = (pivot - about) + offset;
    const A all = sum + count * rest;
    m2 += squares + count * rest * rest;
    pivot = about;
    count += n;
    offset = quotient(all, count);
    m2 = less(m2, all * offset);
  }

  // Without a branch, which lanes would take both ways. Nothing merged into large numbers adds
  // nothing: the square of delta alone might overflow.
  __device__ static Moments merge(const Moments& a, const Moments& b) {
    const bool none = a.count == A(0);
    const A count = a.count + b.count;
    const A share = none ? A(0) : quotient(b.count, count);
    const A delta = (b.pivot - a.pivot) + (b.offset - a.offset);
    return {count, none ? b.pivot : a.pivot, none ? b.offset : a.offset + delta * share,
            none ? b.m2 : a.m2 + b.m2 + delta * (a.count * share) * delta};
  }
};

// The moments of those elements of K packs that are present(k), a bit for each: by sums of
// deviations from the mean of those in the first pack. If that holds one of every K of them, its
// square distance from the mean of all is at most K times their variance, so no more than a factor
// K of the rounding is lost. Unpacked again for the second look at it, the first pack leaves
// registers to more rows.
template <class T, int N, int K, class Present>
__device__ Moments<Acc<T>> moments_of(Packed<T, N> (&packs)[K], Present present) {
  using A = Acc<T>;
  // Most packs are present as a whole.
  const auto for_each = [&](int k, auto&& f) {
    A x[N];
    unpack(packs[k], x);
    unpack_again(packs[k]);
    const uint32_t some = present(k);
    if (some == kAll<N>) {
#pragma unroll
      for (int e = 0; e < N; ++e) f(x[e]);
    } else if (some != 0) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (some >> e & 1) f(x[e]);
      }
    }
  };
  int count = 0;
  A sum = 0;
  for_each(0, [&](A x) { ++count, sum += x; });
  if (count == 0) return {};
  const A pivot = quotient(sum, A(count));
  count = 0;
  A rest = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    for_each(k, [&](A x) {
      const A deviation = x - pivot;
      ++count;
      rest += deviation;
      squares += deviation * deviation;
    });
  }
  const A offset = quotient(rest, A(count));
  return {static_cast<A>(count), pivot, offset, less(squares, offset * rest)};
}

// ---- teams ----

constexpr int kWarp = 32;
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
    const unsigned threads = blockDim.x, thread = threadIdx.x, each = size;
    if (each >= threads) {
      blocks = cluster_blocks();
      count = 1;
      index = 0;
      rank = static_cast<int>(cluster_rank() * threads + thread);
    } else {
      blocks = 1;
      count = static_cast<int>(threads / each);
      index = static_cast<int>(thread / each);
      rank = static_cast<int>(thread % each);
    }
  }

  // Of this team among all of the grid.
  __device__ int64_t number() const { return int64_t{cluster_index()} * count + index; }
  // Its warps in one block.
  __device__ int warps() const {
    return (blocks > 1 ? static_cast<int>(blockDim.x) : size) / kWarp;
  }
};

// A number of lanes that is known when a kernel is compiled: then no step asks whether it is taken.
template <int kLanes>
struct Lanes {
  __device__ constexpr operator int() const { return kLanes; }
};

// Combines the values of groups of `lanes` neighbouring lanes, a power of two, or of every
// first-th of them; every lane gets the same bits, because both partners merge in the same order.
template <class M, class L>
__device__ M across_lanes(M value, L lanes, int first = 1) {
  constexpr int kWords = sizeof(M) / 4;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if (step >= lanes) break;
    if (step < first) continue;
    M other;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint32_t*>(&other)[i] =
          __shfl_xor_sync(0xffffffffu, reinterpret_cast<const uint32_t*>(&value)[i], step);
    }
    value = M::merge(value, other);
  }
  return value;
}

// As for other monoids, but by sums, which take a fraction of the instructions of merges: first the
// mean of the group, about the pivot of its first lane with any numbers, then the squares about it.
template <class A, class L>
__device__ Moments<A> across_lanes(const Moments<A>& own, L lanes) {
  const unsigned lane = threadIdx.x % kWarp, group = lanes, first = lane / group * group;
  const unsigned some = __ballot_sync(0xffffffffu, own.count > A(0)) >> first;
  const A pivot = __shfl_sync(0xffffffffu, own.pivot, first + __ffs(some) - 1);
  // An empty lane has no mean; nor has an empty group.
  const A mean = own.count > A(0) ? (own.pivot - pivot) + own.offset : A(0);
  const SumPair<A> sums = across_lanes(SumPair<A>{own.count, own.count * mean}, lanes);
  const A offset = quotient(sums.second, sums.first > A(0) ? sums.first : A(1));
  const A delta = mean - offset;
  const Sum<A> m2 = across_lanes(Sum<A>{own.m2 + own.count * delta * delta}, lanes);
  return {sums.first, sums.first > A(0) ? pivot : A(0), offset, m2.value};
}

// R independent values at once.
template <class M, int R>
struct Each {
  M of[R];

  __device__ static Each merge(const Each& a, const Each& b) {
    Each merged;
#pragma unroll
    for (int r = 0; r < R; ++r) merged.of[r] = M::merge(a.of[r], b.of[r]);
    return merged;
  }
};
template <class M, int R, class L>
__device__ Each<M, R> across_lanes(const Each<M, R>& value, L lanes) {
  Each<M, R> merged;
#pragma unroll
  for (int r = 0; r < R; ++r) merged.of[r] = across_lanes(value.of[r], lanes);
  return merged;
}

// Several at once.
template <class M, int K>
__device__ M merge_all(const M (&some)[K]) {
  M merged = some[0];
#pragma unroll
  for (int k = 1; k < K; ++k) merged = M::merge(merged, some[k]);
  return merged;
}

// By sums, as across lanes.
template <class A, int K>
__device__ Moments<A> merge_all(const Moments<A> (&some)[K]) {
  Moments<A> merged;
  A sum = 0, mean[K];
#pragma unroll
  for (int k = K - 1; k >= 0; --k) {
    if (some[k].count > A(0)) merged.pivot = some[k].pivot;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    mean[k] = some[k].count > A(0) ? (some[k].pivot - merged.pivot) + some[k].offset : A(0);
    merged.count += some[k].count;
    sum += some[k].count * mean[k];
  }
  merged.offset = quotient(sum, merged.count > A(0) ? merged.count : A(1));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const A delta = mean[k] - merged.offset;
    merged.m2 += some[k].m2 + some[k].count * delta * delta;
  }
  return merged;
}

// Of entry(first), entry(first + step), ... short of end, K at a time. They are read without a
// condition, so that all are on their way at once.
template <int K, class I, class Entry>
__device__ auto merge_range(I first, I end, int step, Entry entry) {
  using M = decltype(entry(first));
  M merged = {};
  for (I i = first; i < end; i += I(K) * step) {
    M some[K];
#pragma unroll
    for (int k = 0; k < K; ++k) some[k] = entry(i + I(k) * step < end ? i + I(k) * step : i);
#pragma unroll
    for (int k = 1; k < K; ++k) {
      if (i + I(k) * step >= end) some[k] = {};
    }
    merged = M::merge(merged, merge_all(some));
  }
  return merged;
}

// What the warps of a block, and of its cluster, leave for each other. Two halves take turns, each
// with a barrier: a warp may enter the next reduction while a slower one still reads the results of
// this one, but not the one after. Therefore every lane that reads them arrives for the next one
// itself: a barrier orders what those did who arrive. (One lane could arrive for its warp behind a
// __syncwarp, but racecheck does not take that for an order between warps.) Room for as many blocks
// as a cluster may have, and no more: what shared memory takes, the L1 cache has not.
template <class M, int kBlocks = kLargeCluster>
struct Exchange {
  struct Entry {
    uint32_t word[sizeof(M) / 4];
  };
  Entry entry[2][kBlocks * kMaxWarps];
  Barrier barrier[2];
};

// A reduction in two halves: between `post` and `collect` a thread may do other work while slower
// warps, or other blocks of the cluster, catch up. All threads of the block (of the cluster) must
// call each of them together, and collect whatever they posted.
template <class M, int kBlocks = kLargeCluster>
class Reducer {
 public:
  __device__ Reducer(Exchange<M, kBlocks>& shared, const Team& team)
      : shared_(shared), team_(team) {
    if (team.size <= kWarp) return;
    if (threadIdx.x == 0) {
      // Of a cluster only one thread arrives, and announces what the warps of all blocks will send.
      const int arrivals = team.blocks > 1 ? 1 : readers();
      shared.barrier[0].init(arrivals);
      shared.barrier[1].init(arrivals);
    }
    if (team.blocks > 1) {
      cluster_begin();
    } else {
      __syncthreads();
    }
  }

  // A block whose peers wait for it to start must not leave unmet.
  __device__ ~Reducer() {
    if (team_.blocks > 1 && turn_ == 0) cluster_wait();
  }

  __device__ void post(const M& value) {
    if (team_.size < kWarp) {
      own_ = across_lanes(value, team_.size);
      return;
    }
    own_ = across_lanes(value, Lanes<kWarp>{});
    if (team_.size == kWarp) return;
    const int warp = static_cast<int>(threadIdx.x / kWarp);
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Barrier& barrier = shared_.barrier[turn_ & 1];
    if (team_.blocks > 1) {
      if (turn_ == 0) cluster_wait();
      __syncwarp();  // some lanes send for all, which have read the results of the last reduction
      if (threadIdx.x == 0) barrier.arrive_expecting(team_.size / kWarp * sizeof(Entry));
      Entry& entry = shared_.entry[turn_ & 1][cluster_rank() * team_.warps() + warp];
      if (lane < team_.blocks) barrier.send(entry.word, words(own_).word, lane);
    } else {
      if (lane == 0) shared_.entry[turn_ & 1][warp] = words(own_);
      if (reads()) barrier.arrive();
    }
  }

  __device__ M collect() {
    if (team_.size <= kWarp) return own_;
    shared_.barrier[turn_ & 1].wait(turn_ / 2 & 1);
    const int warps = team_.warps(), entries = warps * team_.blocks;
    const Entry* const entry = shared_.entry[turn_ & 1] + team_.index * warps;
    const auto read = [&](int i) {
      alignas(M) const Entry one = entry[i];
      return reinterpret_cast<const M&>(one);
    };
    ++turn_;
    M merged = {};
    if (team_.blocks == 1) {
      const int i = static_cast<int>(threadIdx.x) % kMaxWarps;
      if (i < entries) merged = read(i);
      return across_lanes(merged, Lanes<kMaxWarps>{});
    }
    int i = static_cast<int>(threadIdx.x) % kWarp;
    if (i < entries) merged = read(i);
    for (i += kWarp; i < entries; i += kWarp) merged = M::merge(merged, read(i));
    return across_lanes(merged, Lanes<kWarp>{});
  }

  // Both at once.
  __device__ M all(const M& value) {
    post(value);
    return collect();
  }

 private:
  using Entry = typename Exchange<M, kBlocks>::Entry;

  // The entries of a team in one block, one for each of its warps, fit a half-warp. Every half-warp
  // of the team reads them all, each lane one or none; `collect` goes by this too.
  __device__ bool reads() const {
    return static_cast<int>(threadIdx.x) % kMaxWarps < team_.warps();
  }
  __device__ int readers() const {
    return static_cast<int>(blockDim.x) / kMaxWarps * team_.warps();
  }

  __device__ static Entry words(const M& value) {
    Entry entry;
#pragma unroll
    for (int i = 0; i < int(sizeof(M) / 4); ++i) {
      entry.word[i] = reinterpret_cast<const uint32_t*>(&value)[i];
    }
    return entry;
  }

  Exchange<M, kBlocks>& shared_;
  const Team& team_;
  M own_ = {};
  unsigned turn_ = 0;
};

}  // namespace syntonic
