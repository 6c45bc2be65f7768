// The channel engine: reduces every channel of [outer, channels, inner] to one value of a monoid,
// in a fixed order. Workers leave what they find in scratch memory, a second kernel merges it.
//
// Memory is walked from its end, so that whoever reads it next from its beginning, as elementwise
// kernels do, finds the part that was read last in the L2 cache.
//
// A measure F has the types T of the data, A of accumulation, M of the monoid, and
//   int         kRows, the rows of columns that a thread has under way at a time
//   Raw<V>      V elements as they came from memory
//   Raw<V>      read<V>(int64_t first, int count) const     of which count <= V exist
//   Channel     channel(int64_t partial, int64_t channel) const         what is known of a channel
//   void        gather<R, V>(M&, const Raw<V> (&)[R], int e, const Channel&, valid) const
//                 takes in element e of each Raw, or all elements for e < 0; valid(r, e)
//   void        store(int64_t result, const M&) const
#pragma once

#include "row.cuh"

namespace syntonic {

constexpr int kChannelThreads = 256;
constexpr int kChannelWarps = kChannelThreads / kWarp;
// Loads of a thread under way at a time, of V elements out of the N that one may bring.
template <int V, int N>
constexpr int kPlaneLoads = V == N ? 4 : 8;

// How the work on a partial is spread.
struct ChannelPlan {
  int64_t members;  // workers that share it
  int64_t fold;     // rows of channels put side by side, so that these are wide and aligned
};

// ---- channels last: [rows, channels], a warp on a row ----

// One block works on a tile of columns, those of `fold` rows of channels side by side, and on every
// members-th group of such rows.
template <class F>
__global__ void __launch_bounds__(kChannelThreads, 2)
    reduce_columns(const F f, const Channels shape, const ChannelPlan plan,
                   typename F::M* entries) {
  using M = typename F::M;
  constexpr int N = kVector<typename F::T>;
  constexpr int R = F::kRows;
  constexpr int kTile = N * kWarp;
  __shared__ M shared[kChannelWarps][kTile];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t width = shape.count * plan.fold;
  const int64_t elements = shape.outer * shape.count;  // of a partial
  const int64_t tiles = (width + kTile - 1) / kTile;
  const int64_t unit = blockIdx.x / tiles;
  const int64_t partial = unit / plan.members;
  const int64_t tile = blockIdx.x % tiles * kTile;
  const int64_t column = tile + lane * N;
  const int64_t rows = (elements + width - 1) / width;
  const int64_t step = plan.members * kChannelWarps;

  typename F::Channel channel[N];
#pragma unroll
  for (int e = 0; e < N; ++e) channel[e] = f.channel(partial, (column + e) % shape.count);
  M found[N] = {};
  for (int64_t turn = unit % plan.members * kChannelWarps + warp; turn < rows; turn += R * step) {
    typename F::template Raw<N> raw[R];
    const int64_t last = rows - 1 - turn, start = last * width + column;
    if (column < width && start + N <= elements && last >= (R - 1) * step) {
      const int64_t first = partial * elements + start;
#pragma unroll
      for (int r = 0; r < R; ++r) raw[r] = f.template read<N>(first - r * step * width, N);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        f.template gather<R, N>(found[e], raw, e, channel[e], [](int, int) { return true; });
      }
      continue;
    }
    int count[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = last - r * step, first = row * width + column;
      const int64_t rest = row < 0 || column >= width ? 0 : elements - first;
      count[r] = rest <= 0 ? 0 : rest < N ? static_cast<int>(rest) : N;
      raw[r] = f.template read<N>(partial * elements + (count[r] ? first : 0), count[r]);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
      f.template gather<R, N>(found[e], raw, e, channel[e],
                              [&](int r, int e) { return e < count[r]; });
    }
  }

#pragma unroll
  for (int e = 0; e < N; ++e) shared[warp][e * kWarp + lane] = found[e];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTile; i += kChannelThreads) {
    if (tile + i >= width) continue;
    const int place = i % N * kWarp + i / N;
    M merged = shared[0][place];
    for (int other = 1; other < kChannelWarps; ++other) {
      merged = M::merge(merged, shared[other][place]);
    }
    entries[unit * width + tile + i] = merged;
  }
}

// ---- channels before other axes: [outer, channels, inner], a block on a channel ----

// V elements a load: a divisor of `inner`.
template <class F, int V>
__global__ void __launch_bounds__(kChannelThreads, 4)
    reduce_planes(const F f, const Channels shape, const ChannelPlan plan, typename F::M* entries) {
  using M = typename F::M;
  constexpr int R = kPlaneLoads<V, kVector<typename F::T>>;
  __shared__ Exchange<M> exchange;
  const Team team(kChannelThreads);
  Reducer<M> reduce(exchange, team);
  const int64_t block = int64_t{gridDim.x} - 1 - blockIdx.x;
  const int64_t unit = block / shape.count, channel = block % shape.count;
  const int64_t partial = unit / plan.members, member = unit % plan.members;
  const int64_t begin = shape.outer * member / plan.members;
  const int64_t end = shape.outer * (member + 1) / plan.members;
  const int64_t row = shape.count * shape.inner;
  const int packs = static_cast<int>(shape.inner / V);
  const int64_t start = partial * shape.outer * row + channel * shape.inner;
  const int rows_of_step = kChannelThreads / packs, packs_of_step = kChannelThreads % packs;
  const typename F::Channel known = f.channel(partial, channel);

  // The place of this thread, which moves on by as many packs as the block has threads.
  const int thread = static_cast<int>(threadIdx.x);
  int64_t outer = begin + thread / packs;
  int pack = thread % packs;
  int64_t place = start + outer * row + pack * V;
  const int64_t step = rows_of_step * row + packs_of_step * V, wrap = row - packs * V;
  const auto move_on = [&] {
    outer += rows_of_step, pack += packs_of_step, place += step;
    if (pack >= packs) pack -= packs, ++outer, place += wrap;
  };
  const int64_t full =
      end - (R - 1) * (rows_of_step + 1);  // places from below lead to R that exist
  M found = {};
  while (outer < end) {
    typename F::template Raw<V> raw[R];
    if (outer < full) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        raw[r] = f.template read<V>(place, V);
        move_on();
      }
      f.template gather<R, V>(found, raw, -1, known, [](int, int) { return true; });
      continue;
    }
    bool present[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      present[r] = outer < end;
      raw[r] = f.template read<V>(present[r] ? place : 0, present[r] ? V : 0);
      move_on();
    }
    f.template gather<R, V>(found, raw, -1, known, [&](int r, int) { return present[r]; });
  }
  found = reduce.all(found);
  if (threadIdx.x == 0) entries[unit * shape.count + channel] = found;
}

// ---- merging ----

constexpr int kMergeChannels = 8;
constexpr int kMergeLanes = kChannelThreads / kMergeChannels;  // threads that share a channel

// entries[partial][rows][channels] -> one result for each channel of each partial.
template <class F>
__global__ void __launch_bounds__(kChannelThreads)
    merge_channels(const F f, const typename F::M* entries, int64_t rows, int64_t channels) {
  using M = typename F::M;
  __shared__ M shared[kMergeLanes][kMergeChannels];
  const int64_t tiles = (channels + kMergeChannels - 1) / kMergeChannels;
  const int64_t partial = blockIdx.x / tiles;
  const int x = static_cast<int>(threadIdx.x) % kMergeChannels;
  const int lane = static_cast<int>(threadIdx.x) / kMergeChannels;
  const int64_t channel = blockIdx.x % tiles * kMergeChannels + x;
  M merged = {};
  if (channel < channels) {
#pragma unroll 4
    for (int64_t row = lane; row < rows; row += kMergeLanes) {
      merged = M::merge(merged, entries[(partial * rows + row) * channels + channel]);
    }
  }
  shared[lane][x] = merged;
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[lane][x] = M::merge(shared[lane][x], shared[lane + half][x]);
  }
  if (lane == 0 && channel < channels) f.store(partial * channels + channel, shared[0][x]);
}

// ---- launching ----

// The largest power of two up to `most` that divides n.
inline int power_in(int64_t n, int most) {
  int power = 1;
  while (power < most && n % (2 * power) == 0) power *= 2;
  return power;
}

// `vector` elements may be loaded at once, as far as the pointers are concerned.
template <class F>
Status reduce_channels(Stream stream, const F& f, const Channels& shape, int vector, void* scratch,
                       int64_t scratch_size) {
  using M = typename F::M;
  constexpr int N = kVector<typename F::T>;
  constexpr int kTile = N * kWarp;
  M* entries = static_cast<M*>(scratch);
  // Entries that there is room for, for each channel of a partial.
  const int64_t room =
      scratch_size * int64_t{sizeof(typename F::A)} / int64_t{sizeof(M)} / shape.results();
  if (room < 1) return cudaErrorInvalidValue;
  const int64_t whole = N / power_in(shape.count, N);  // rows of channels that make whole packs
  ChannelPlan plan = {1, 1};
  Status status;
  if (shape.inner == 1 && vector == N && whole <= room &&
      (shape.partials == 1 || shape.outer * shape.count % N == 0)) {
    plan.fold = shape.count < kTile ? kTile / power_in(shape.count, kTile) : whole;
    if (plan.fold > std::min(shape.outer, room)) plan.fold = whole;
    const int64_t tiles = ceil_div(shape.count * plan.fold, kTile);
    const int64_t rows = ceil_div(shape.outer, plan.fold);
    const int64_t resident = resident_blocks(Grid{0, kChannelThreads}, reduce_columns<F>);
    plan.members =
        std::max<int64_t>(1, std::min({resident / (shape.partials * tiles), room / plan.fold,
                                       ceil_div(rows, kChannelWarps)}));
    status = launch(stream, {shape.partials * plan.members * tiles, kChannelThreads},
                    reduce_columns<F>, f, shape, plan, entries);
  } else {
    const int by = std::min(vector, power_in(shape.inner, N));
    if (shape.inner / by > kMaxGrid - kChannelThreads) return cudaErrorInvalidValue;
    const auto kernel = by == N       ? reduce_planes<F, N>
                        : by * 2 == N ? reduce_planes<F, (N + 1) / 2>
                                      : reduce_planes<F, 1>;
    // Two waves of blocks: fewer wait long for the last, more begin and end too often.
    const int64_t blocks = 2 * resident_blocks(Grid{0, kChannelThreads}, kernel);
    plan.members = std::max<int64_t>(
        1, std::min({ceil_div(blocks, shape.results()), room, shape.outer,
                     shape.outer * shape.inner / (int64_t{by} * kChannelThreads)}));
    status = launch(stream, {shape.results() * plan.members, kChannelThreads}, kernel, f, shape,
                    plan, entries);
  }
  if (status != kSuccess) return status;
  const int64_t tiles = ceil_div(shape.count, kMergeChannels);
  return launch(stream, {shape.partials * tiles, kChannelThreads}, merge_channels<F>, f, entries,
                plan.members * plan.fold, shape.count);
}

template <class F>
Status load_channels() {
  constexpr int N = kVector<typename F::T>;
  return load_kernels(reduce_columns<F>, reduce_planes<F, N>, reduce_planes<F, (N + 1) / 2>,
                      reduce_planes<F, 1>, merge_channels<F>);
}

}  // namespace syntonic
