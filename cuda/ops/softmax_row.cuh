// Rows of logits that are too wide for registers: how they lie in memory, and the two ways to go
// through them, streamed from memory or staged in the shared memory of a cluster.
#pragma once

#include "core/async_copy.cuh"
#include "ops/softmax.cuh"
#include "tuning/softmax.h"

namespace syntonic {

// A contiguous part of an array, such as a row: whole packs, and single elements before and after
// them, whose packs reach into its neighbours. If the arrays of a kernel are not aligned alike, all
// elements are single ones. The packs of a long part begin at a line, so that the accesses of a
// warp touch as few lines as they can.
template <class T>
struct Stretch {
  static constexpr int N = kVector<T>;
  static constexpr int kLong = 8192;
  int64_t start;  // in elements of the array
  int width;
  int head = 0;  // elements before the first whole pack
  int packs = 0;

  __device__ Stretch(const T* array, int64_t start, int width, bool vector)
      : start(start), width(width) {
    if (!vector) return;
    const auto address = reinterpret_cast<uintptr_t>(array + start);
    const int unit = width < kLong ? 16 : 16 * kLine;
    head = min(static_cast<int>(-address % unit / sizeof(T)), width);
    packs = (width - head) / N;
  }

  __device__ int first(int pack) const { return head + pack * N; }
  __device__ int edges() const { return width - packs * N; }
  // The place of the i-th single element.
  __device__ int edge(int i) const { return i < head ? i : i + packs * N; }
};

// A row behind the last one is empty.
template <class T>
__device__ Stretch<T> stretch_of_row(const T* array, int64_t row, int64_t rows, int width,
                                     bool vector) {
  const bool exists = row < rows;
  return {array, exists ? row * width : 0, exists ? width : 0, vector};
}

// Packs that a thread loads before it uses the first of them.
template <class T>
constexpr int kPacksUnderWay = sizeof(T) == 2 ? kStreamPacks16 : kStreamPacks;

// The logits of a row that is streamed.
template <bool kPlain, class T>
struct LogitStream {
  using A = Acc<T>;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = kPlain ? kPacksUnderWay<T> : 4;  // the others need registers

  const Logits<T>& from;
  const Stretch<T>& of;
  RowStart row;
  A scale;

  __device__ LogitStream(const Logits<T>& from, const Stretch<T>& of, int64_t group, int width)
      : from(from), of(of), row{of.start, group * width, width}, scale(from.scale_of(group)) {}

  __device__ uint32_t read(int pack, const Packed<T, N>& x, A (&z)[N]) const {
    return logits_of<kPlain>(from, scale, row, of.first(pack), x, z);
  }
  // Only a cross entropy has plain logits here. It reads them once: the cache need not keep them.
  __device__ Packed<T, N> raw(int pack) const {
    constexpr Cache kCache = kPlain ? Cache::passing : Cache::keep;
    return read_pack<T, N, kCache>(from.x + of.start + of.first(pack));
  }
  __device__ A edge(int i, bool& present) const {
    return logit_at(from, scale, row, of.edge(i), present);
  }

  // The largest logit and the sum, of the elements of this thread.
  __device__ MaxSum<A> max_sum(const Team& team) const {
    MaxSum<A> found;
    uint32_t any = 0;
    // The first of its single elements is read together with the first packs.
    bool edge_present = false;
    A first_edge[1][1] = {{-kInfinity<A>}};
    if (team.rank < of.edges()) first_edge[0][0] = edge(team.rank, edge_present);
    for (int turn = team.rank; turn < of.packs; turn += kPacks * team.size) {
      Packed<T, N> x[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int pack = turn + k * team.size;
        x[k] = pack < of.packs ? raw(pack) : lowest_pack<T, N>();
      }
      if constexpr (kPlain) {
        Packed<T, N> top = x[0];
#pragma unroll
        for (int k = 1; k < kPacks; ++k) raise(top, x[k]);
        const A base = found.raise_to(largest(top));
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          A z[N];
          unpack(x[k], z);
          add_terms<T>(found.sum, base, z);
        }
        any |= 1;
      } else {
        A z[kPacks][N];
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          const int pack = turn + k * team.size;
          if (pack < of.packs) {
            any |= read(pack, x[k], z[k]);
          } else {
            hide_absent(0, z[k], -kInfinity<A>);
          }
        }
        found.template extend<T>(z);
      }
    }
    found.template extend<T>(first_edge);
    any |= edge_present;
    for (int i = team.rank + team.size; i < of.edges(); i += team.size) {
      bool present;
      const A z[1][1] = {{edge(i, present)}};
      found.template extend<T>(z);
      any |= present;
    }
    tell_apart(found, any);
    return found;
  }
};

// How many threads go through `packs` in turns so that the fewest are idle in the last turn: whole
// warps, from `least` to `most` threads.
inline int even_threads(int64_t packs, int least, int most) {
  int threads = least;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int some = least; some <= most; some += kWarp) {
    const int64_t padded = ceil_div(packs, some) * some;
    if (padded <= fewest) fewest = padded, threads = some;
  }
  return threads;
}

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

// A staged row: every thread keeps its first kHeldPacks packs in registers and stages the others in
// shared memory, as pieces. That leaves shared memory for the rows of other blocks.

// Pieces that a block stages, of a row of `packs` packs that `blocks` blocks share.
__host__ __device__ constexpr int64_t stage_pieces(int64_t packs, int blocks, int threads) {
  const int team = blocks * threads;
  const int64_t turns = (packs + team - 1) / team;
  return turns > kHeldPacks ? (turns - kHeldPacks) * threads : 0;
}

struct StagePlan {
  int blocks = 0;  // 0: it does not fit
  int threads = 0;
  size_t shared = 0;  // bytes of a block

  int team() const { return blocks * threads; }
  Grid grid(int64_t rows) const { return {rows * blocks, threads, blocks, shared}; }
};

// For rows of `row_bytes` of each of `arrays` arrays.
template <class K>
StagePlan plan_stages(int64_t row_bytes, int arrays, int most, K* kernel) {
  const int64_t pieces = row_bytes / 16;
  if (!compiled_for_90(kernel)) most = 1;
  StagePlan plan = {1};
  const auto crowded = [&](int64_t room) { return pieces * arrays > room * plan.blocks; };
  while (plan.blocks < std::min(most, kMaxCluster) && crowded(kStagePieces)) plan.blocks *= 2;
  while (plan.blocks < most && crowded(kMostPieces)) plan.blocks *= 2;
  const int64_t share = ceil_div(pieces, plan.blocks);
  // If a multiprocessor has room for few blocks, large blocks keep it busier.
  const int64_t some = share * arrays > kStagePieces + kStagePieces / 8 ? 224 : 128;
  const int least = static_cast<int>(std::min(some, ceil_div(share, kWarp) * kWarp));
  plan.threads = even_threads(share, std::max(least, kWarp), kStageThreads);
  plan.shared = sizeof(uint4) * arrays * (stage_pieces(pieces, plan.blocks, plan.threads) + kLine);
  const bool fits = plan.shared <= static_cast<size_t>(dynamic_shared_capacity(kernel));
  if (plan.blocks > kMaxCluster && (!fits || resident_clusters(plan.grid(1), kernel) == 0)) {
    return plan_stages(row_bytes, arrays, kMaxCluster, kernel);
  }
  if (!fits) plan.blocks = 0;
  return plan;
}

// Where this thread stages its packs, the first of which is at `first_pack`. A piece has the place
// in its line of shared memory that its pack has in a line of global memory.
template <class T>
__device__ uint4* stage_of(uint4* pieces, const T* first_pack) {
  return pieces + threadIdx.x + reinterpret_cast<uintptr_t>(first_pack) / 16 % kLine;
}

// Goes through the packs of this thread: calls held(pack, register) for those in registers, then
// staged(pack, piece) for the others.
template <class Held, class Staged>
__device__ void for_packs(int packs, const Team& team, Held&& held, Staged&& staged) {
  int pack = team.rank;
#pragma unroll
  for (int h = 0; h < kHeldPacks; ++h, pack += team.size) {
    if (pack < packs) held(pack, h);
  }
#pragma unroll 2
  for (int piece = 0; pack < packs; pack += team.size, piece += blockDim.x) staged(pack, piece);
}

// Starts to read a row. The staged packs are there after wait_copies; those in registers need none.
template <class T>
__device__ void fetch_packs(Packed<T, kVector<T>> (&held)[kHeldPacks], uint4* stage,
                            const T* first_pack, int packs, const Team& team) {
  constexpr int N = kVector<T>;
  for_packs(
      packs, team,
      [&](int pack, int h) { held[h] = read_pack<T, N>(first_pack + int64_t{pack} * N); },
      [&](int pack, int piece) {
        copy_async<16>(stage + piece, 1, first_pack + int64_t{pack} * N, true);
      });
  commit_copies();
}

}  // namespace syntonic
