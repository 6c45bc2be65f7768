// The channel engine: reduces every channel of [outer, channels, inner] to one value of a monoid,
// in a fixed order. Workers leave what they find in scratch memory, a second kernel merges it.
//
// Memory is walked from its end: what of it is still in the L2 cache is what a kernel that begins
// at its beginning, as elementwise ones do, reads first.
//
// A measure F has the types T of the data, A of accumulation, M of the monoid, and
//   int         kReads, packs that a thread has under way at a time
//   Raw<V>      V elements as they came from memory
//   Number      what it makes of one element
//   Channel     what is known of a channel
//   Turn        what it gathers of a channel from a few packs
//   Raw<V>   read<V>(int64_t first) const
//   void     unpack(const Raw<V>&, Number (&)[V]) const
//   Channel  channel(int64_t partial, int64_t channel) const
//   Turn     begin(const M&, const Number&) const     the number is one of those to come
//   void     take(Turn&, const Number&, const Channel&) const
//   void     end(M&, const Turn&, int n) const        n numbers were taken
//   void     store(int64_t result, const M&) const
#pragma once

#include "row.cuh"

namespace syntonic {

constexpr int kChannelThreads = 256;

// Takes in the numbers of the first n packs: element e of each into channel e, or all into the only
// one.
template <bool kAll, int R, int V, int E, class F>
__device__ void take_packs(const F& f, const typename F::template Raw<V> (&raw)[R], int n,
                           const typename F::Channel (&channel)[E], typename F::M (&found)[E]) {
  static_assert(E == 1 || E == V);
  typename F::Turn turn[E];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (!kAll && r >= n) continue;
    typename F::Number x[V];
    f.unpack(raw[r], x);
#pragma unroll
    for (int e = 0; r == 0 && e < E; ++e) turn[e] = f.begin(found[e], x[e]);
#pragma unroll
    for (int e = 0; e < V; ++e) f.take(turn[e % E], x[e], channel[e % E]);
  }
#pragma unroll
  for (int e = 0; e < E; ++e) f.end(found[e], turn[e], (kAll ? R : n) * V / E);
}

// All of `left` packs that `next` reads one after the other, R of them under way at a time.
template <int R, int V, int E, class F, class Next>
__device__ void take_in(const F& f, int left, Next next, const typename F::Channel (&channel)[E],
                        typename F::M (&found)[E]) {
  typename F::template Raw<V> raw[R];
  for (; left >= R; left -= R) {
#pragma unroll
    for (int r = 0; r < R; ++r) raw[r] = next();
    take_packs<true, R, V>(f, raw, R, channel, found);
  }
  if (left <= 0) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (r < left) raw[r] = next();
  }
  take_packs<false, R, V>(f, raw, left, channel, found);
}

// How the work on a partial is spread.
struct ChannelPlan {
  int64_t members = 1;  // workers that share it
  int64_t fold = 1;     // rows of channels put side by side, so that these are wide and aligned
  int packs = 0;        // of a tile
};

// ---- tiles of [outer, channels * inner], every thread on columns of its own ----

// One block works on a tile of columns, some whole channels of `inner` columns each, of `fold` rows
// side by side, and on every members-th group of such rows. It leaves [partial, member, row of the
// fold, channel].
template <class F>
__global__ void __launch_bounds__(kChannelThreads, 2)
    reduce_columns(const F f, const Channels shape, const ChannelPlan plan,
                   typename F::M* entries) {
  using M = typename F::M;
  constexpr int N = kVector<typename F::T>;
  __shared__ M shared[N][kChannelThreads + 1];  // one more: other banks for another e
  const int thread = static_cast<int>(threadIdx.x);
  const int packs = plan.packs, rows_at_once = kChannelThreads / packs;
  const int inner = static_cast<int>(shape.inner);
  const int64_t row_width = shape.count * inner;
  const int64_t width = row_width * plan.fold;
  const int64_t elements = shape.outer * row_width;  // of a partial
  const int64_t tiles = (width + packs * N - 1) / (packs * N);
  const int64_t unit = blockIdx.x / tiles;
  const int64_t partial = unit / plan.members;
  const int64_t tile = blockIdx.x % tiles * packs * N;
  const int row_of_thread = thread / packs;
  const int64_t column = tile + thread % packs * N;
  const bool works = row_of_thread < rows_at_once && column < width;
  const int64_t rows = (elements + width - 1) / width;
  const int64_t step = plan.members * rows_at_once;
  const int64_t turn = unit % plan.members * rows_at_once + row_of_thread;

  typename F::Channel channel[N];
#pragma unroll
  for (int e = 0; e < N; ++e) channel[e] = f.channel(partial, (column + e) % row_width / inner);
  M found[N] = {};
  int left = works && turn < rows ? static_cast<int>((rows - turn + step - 1) / step) : 0;
  int64_t place = (rows - 1 - turn) * width + column;
  if (left > 0 && place + N > elements) {
    // Only the last row may end early.
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const auto next = [&] { return f.template read<1>(partial * elements + place + e); };
      const typename F::Channel known[1] = {channel[e]};
      M one[1] = {};
      take_in<1, 1>(f, place + e < elements, next, known, one);
      found[e] = one[0];
    }
    --left, place -= step * width;
  }
  const auto next = [&] {
    const int64_t first = partial * elements + place;
    place -= step * width;
    return f.template read<N>(first);
  };
  take_in<F::kReads, N>(f, left, next, channel, found);

  // Where a pack is of one channel, so is what was found of it.
  const int pieces = inner % N == 0 ? 1 : N;
#pragma unroll
  for (int e = 1; e < N; ++e) {
    if (pieces == 1) found[0] = M::merge(found[0], found[e]);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (e < pieces) shared[e][thread] = found[e];
  }
  __syncthreads();
  // As many lanes of a warp on a channel as there are threads for it.
  const int channels = packs * N / inner, pieces_of_channel = inner * pieces / N;
  const int64_t results = width / inner;
  int lanes = 1;
  while (lanes < kWarp && 2 * lanes * channels <= kChannelThreads) lanes *= 2;
  for (int first = 0; first < channels; first += kChannelThreads / lanes) {
    const int i = first + thread / lanes;
    const int64_t result = tile / inner + i;
    const bool exists = i < channels && result < results;
    M merged = {};
    for (int j = thread % lanes; exists && j < rows_at_once * pieces_of_channel; j += lanes) {
      const int place = i * pieces_of_channel + j % pieces_of_channel;
      const int row = j / pieces_of_channel;
      merged = M::merge(merged, shared[place % pieces][row * packs + place / pieces]);
    }
    merged = across_lanes(merged, lanes);
    if (exists && thread % lanes == 0) entries[unit * results + result] = merged;
  }
}

// ---- channels before other axes: [outer, channels, inner], a block on a channel ----

// V elements a load: a divisor of `inner`.
template <class F, int V>
__global__ void __launch_bounds__(kChannelThreads, 4)
    reduce_planes(const F f, const Channels shape, const ChannelPlan plan, typename F::M* entries) {
  using M = typename F::M;
  constexpr int R = V == kVector<typename F::T> ? F::kReads : 8;
  __shared__ Exchange<M, 1> exchange;
  const Team team(kChannelThreads);
  Reducer<M, 1> reduce(exchange, team);
  const int64_t block = int64_t{gridDim.x} - 1 - blockIdx.x;
  const int64_t unit = block / shape.count, channel = block % shape.count;
  const int64_t partial = unit / plan.members, member = unit % plan.members;
  const int64_t begin = shape.outer * member / plan.members;
  const int64_t end = shape.outer * (member + 1) / plan.members;
  const int64_t row = shape.count * shape.inner;
  const int packs = static_cast<int>(shape.inner / V);
  const int64_t start = partial * shape.outer * row + channel * shape.inner;
  const int rows_of_step = kChannelThreads / packs, packs_of_step = kChannelThreads % packs;

  // The place of this thread, which moves on by as many packs as the block has threads.
  const int thread = static_cast<int>(threadIdx.x);
  int pack = thread % packs;
  int64_t place = start + (begin + thread / packs) * row + pack * V;
  const int64_t step = rows_of_step * row + packs_of_step * V, wrap = row - packs * V;
  const auto next = [&] {
    const int64_t first = place;
    pack += packs_of_step, place += step;
    if (pack >= packs) pack -= packs, place += wrap;
    return f.template read<V>(first);
  };
  const int64_t rest = (end - begin) * packs - thread;
  const int left = rest > 0 ? static_cast<int>((rest - 1) / kChannelThreads) + 1 : 0;
  const typename F::Channel known[1] = {f.channel(partial, channel)};
  M all[1] = {};
  take_in<R, V>(f, left, next, known, all);
  const M found = reduce.all(all[0]);
  if (threadIdx.x == 0) entries[unit * shape.count + channel] = found;
}

// ---- merging ----

constexpr int kMergeChannels = 4;
constexpr int kMergeLanes = kChannelThreads / kMergeChannels;  // threads that share a channel

// entries[partial][rows][channels] -> one result for each channel of each partial.
template <class F>
__global__ void __launch_bounds__(kChannelThreads)
    merge_channels(const F f, const typename F::M* entries, int64_t rows, int64_t channels) {
  using M = typename F::M;
  __shared__ M shared[kMergeLanes][kMergeChannels];
  const int64_t tiles = (channels + kMergeChannels - 1) / kMergeChannels;
  const int64_t partial = blockIdx.x / tiles;
  const int x = static_cast<int>(threadIdx.x % kMergeChannels);
  const int lane = static_cast<int>(threadIdx.x / kMergeChannels);
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

// Tiles of columns, if every row of channels begins a pack of N elements and channels are narrow
// enough. Otherwise there are no packs.
template <int N>
ChannelPlan plan_columns(const Channels& shape, int64_t room) {
  ChannelPlan plan;
  const int64_t width = shape.count * shape.inner;
  if (shape.inner == 1) {
    constexpr int kTile = N * kWarp;
    const int64_t whole = N / power_in(width, N);  // rows of channels that make whole packs
    if (whole > room || (shape.partials > 1 && shape.outer * width % N != 0)) return {};
    plan.packs = kWarp;
    plan.fold = width < kTile ? kTile / power_in(width, kTile) : whole;
    if (plan.fold > std::min(shape.outer, room)) plan.fold = whole;
    return plan;
  }
  int64_t channels = N / power_in(shape.inner, N);  // that make whole packs
  if (width % N != 0 || channels * shape.inner / N > kChannelThreads) return {};
  while (2 * channels * shape.inner / N <= kChannelThreads && channels < shape.count) channels *= 2;
  plan.packs = static_cast<int>(channels * shape.inner / N);
  return plan;
}

// How many members leave the fewest blocks without work while the last ones are at theirs.
inline int64_t even_members(int64_t tiles, int64_t resident) {
  const int64_t least = std::max<int64_t>(1, resident / tiles);
  int64_t best = least;
  double busiest = 0;
  for (int64_t members = least; members < least + 4; ++members) {
    const int64_t blocks = tiles * members;
    const double busy = double(blocks) / double(ceil_div(blocks, resident) * resident);
    if (busy > busiest + 0.02) best = members, busiest = busy;
  }
  return best;
}

// `vector` elements may be loaded at once, as far as the pointers are concerned.
template <class F>
Status reduce_channels(Stream stream, const F& f, const Channels& shape, int vector, void* scratch,
                       int64_t scratch_size) {
  using M = typename F::M;
  constexpr int N = kVector<typename F::T>;
  M* entries = static_cast<M*>(scratch);
  // Entries that there is room for, for each channel of a partial.
  const int64_t room =
      scratch_size * int64_t{sizeof(typename F::A)} / int64_t{sizeof(M)} / shape.results();
  if (room < 1) return cudaErrorInvalidValue;
  ChannelPlan plan = vector == N ? plan_columns<N>(shape, room) : ChannelPlan{};
  Status status;
  if (plan.packs > 0) {
    const int64_t width = shape.count * shape.inner * plan.fold;
    const int64_t tiles = ceil_div(width, int64_t{plan.packs} * N);
    const int64_t rows = ceil_div(shape.outer, plan.fold);
    const int64_t resident = resident_blocks(Grid{0, kChannelThreads}, reduce_columns<F>);
    plan.members = std::max<int64_t>(
        1, std::min({even_members(shape.partials * tiles, resident), room / plan.fold,
                     ceil_div(rows, int64_t{kChannelThreads / plan.packs})}));
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
