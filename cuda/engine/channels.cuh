// The channel engine: reduces every channel of [outer, channels, inner] to one value of a monoid,
// in a fixed order. Workers leave what they find in scratch memory, a second kernel merges it.
//
// Workers read memory from its end. The L2 cache then holds its beginning, where the next kernel,
// an elementwise one, begins to read.
#pragma once

#include <memory>

#include "engine/channel_measure.cuh"

namespace syntonic {

// How the work on a partial is spread. The host divides once, so that threads need not.
struct ChannelPlan {
  int64_t members = 1;  // workers that share it
  int64_t fold = 1;     // rows of channels that count as one, so that it is wide and aligned
  int packs = 0;        // of a tile, or of a plane
  int64_t tiles = 0;
  int64_t each = 0;  // rows for every thread of a column, or planes for every worker
  int64_t rest = 0;  // of which the first ones have one more
};

// ---- tiles of [outer, channels * inner], every thread on columns of its own ----

// A block works on a tile of columns: whole channels of `inner` columns each, of `fold` rows side
// by side. Several blocks, the members of a partial, share its rows. A thread stays on one pack of
// columns.
template <int N>
struct ColumnTile {
  unsigned unit;  // partial * members + member
  unsigned partial;
  int64_t member;
  int rows_at_once;
  int row_of_thread;
  int64_t width;     // of the rows
  int64_t elements;  // of a partial
  int64_t first;     // column of the tile
  int64_t column;    // of the pack
  bool works;        // whether this thread has one

  __device__ ColumnTile(const Channels& shape, const ChannelPlan& plan) {
    const unsigned tiles = plan.tiles, members = plan.members, packs = plan.packs;
    const unsigned threads = kChannelThreads, thread = threadIdx.x, row = thread / packs;
    unit = blockIdx.x / tiles, partial = unit / members;
    member = unit - partial * members;
    rows_at_once = threads / packs, row_of_thread = row;
    width = shape.count * shape.inner * plan.fold;
    elements = shape.outer * shape.count * shape.inner;
    first = int64_t{blockIdx.x - unit * tiles} * packs * N;
    column = first + (thread - row * packs) * N;
    works = row_of_thread < rows_at_once && column < width;
  }

  // Calls body(element of the pack, its channel).
  template <class Body>
  __device__ void for_channels(const Channels& shape, const ChannelPlan& plan, Body body) const {
    const int inner = static_cast<int>(shape.inner);
    const int64_t of_row = plan.fold == 1 ? column : column % (shape.count * inner);
    int64_t channel = inner == 1 ? of_row : of_row / inner;
    int place = static_cast<int>(of_row - channel * inner);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      body(e, channel);
      if (++place == inner) place = 0, channel = channel + 1 == shape.count ? 0 : channel + 1;
    }
  }
};

// A member takes every members-th group of rows. Writes [partial, member, row of the fold,
// channel].
template <class F>
__global__ void __launch_bounds__(kChannelThreads, 2)
    reduce_columns(const F f, const Channels shape, const ChannelPlan plan,
                   typename F::M* entries) {
  wait_for_launches();
  using M = typename F::M;
  constexpr int N = kVector<typename F::T>;
  using Found = M[N][kChannelThreads + 1];  // one more, so that each e is in another bank
  constexpr int kFound = (sizeof(Found) + 15) / 16;
  __shared__ uint4 stages[kPiecesStaged<F> > kFound ? kPiecesStaged<F> : kFound];
  Found& shared = reinterpret_cast<Found&>(stages);
  const ColumnTile<N> tile(shape, plan);
  const unsigned partial = tile.partial, thread = threadIdx.x;
  const int packs = plan.packs, inner = static_cast<int>(shape.inner);
  const int rows_at_once = tile.rows_at_once;
  const int64_t width = tile.width, elements = tile.elements, step = plan.members * rows_at_once;
  const int64_t turn = tile.member * rows_at_once + tile.row_of_thread;
  int left = tile.works ? static_cast<int>(plan.each + (turn < plan.rest)) : 0;
  int64_t place = (plan.each * step + plan.rest - 1 - turn) * width + tile.column;
  // Only the last row may end within a pack. The thread of that pack takes it last, by elements.
  const bool ragged = left > 0 && place + N > elements;
  const int64_t last = place;
  if (ragged) --left, place -= step * width;

  typename F::Channel channel[N] = {};
  tile.for_channels(shape, plan, [&](int e, int64_t i) {
    if (tile.works) channel[e] = f.channel(partial, i);
  });
  M found[N] = {};
  const auto next = [&] {
    const int64_t first = partial * elements + place;
    place -= step * width;
    return first;
  };
  take_in_staged<N>(f, stages, left, next, channel, found);
  if (ragged) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const auto element = [&] { return partial * elements + last + e; };
      const typename F::Channel known[1] = {channel[e]};
      M one[1] = {found[e]};
      take_in<1, 1>(f, last + e < elements, element, known, one);
      found[e] = one[0];
    }
  }

  // If a pack lies in one channel, its results are merged.
  const bool alike = inner % N == 0;
#pragma unroll
  for (int e = 1; e < N; ++e) {
    if (alike) found[0] = M::merge(found[0], found[e]);
  }
  __syncthreads();  // for the memory of the stages
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (e == 0 || !alike) shared[e][thread] = found[e];
  }
  __syncthreads();
  // A warp merges the results of a channel, with as many lanes as there are threads for it.
  const int channels = packs * N / inner, pieces = alike ? inner / N : inner;  // of a channel
  const int64_t results = shape.count * plan.fold;
  int lanes = 1;
  while (lanes < kWarp && 2 * lanes * channels <= kChannelThreads) lanes *= 2;
  for (int first = 0; first < channels; first += kChannelThreads / lanes) {
    const int of_tile = first + static_cast<int>(thread) / lanes;
    const int64_t result = (inner == 1 ? tile.first : tile.first / inner) + of_tile;
    const bool exists = of_tile < channels && result < results;
    const int count = exists ? rows_at_once * pieces : 0;
    const auto entry = [&](int j) -> M {
      const int row = pieces == 1 ? j : j / pieces;
      const int piece = of_tile * pieces + j - row * pieces;
      return alike ? shared[0][row * packs + piece] : shared[piece % N][row * packs + piece / N];
    };
    const M merged =
        across_lanes(merge_range<8>(static_cast<int>(thread) % lanes, count, lanes, entry), lanes);
    if (exists && thread % lanes == 0) entries[tile.unit * results + result] = merged;
  }
}

// ---- channels before other axes: [outer, channels, inner], a block on a channel ----

// V elements a load: a divisor of `inner`.
template <class F, int V>
__global__ void __launch_bounds__(kChannelThreads, 4)
    reduce_planes(const F f, const Channels shape, const ChannelPlan plan, typename F::M* entries) {
  wait_for_launches();
  using M = typename F::M;
  __shared__ Exchange<M, 1> exchange;
  const Team team(kChannelThreads);
  Reducer<M, 1> reduce(exchange, team);
  const unsigned count = shape.count, members = plan.members, packs = plan.packs;
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const unsigned unit = block / count, channel = block - unit * count;
  const unsigned partial = unit / members;
  const int64_t member = unit - partial * members;
  const int64_t planes = plan.each + (member < plan.rest);
  const int64_t begin = member * plan.each + (member < plan.rest ? member : plan.rest);
  const int64_t row = shape.count * shape.inner;
  const unsigned rows_of_step = kChannelThreads / packs;
  const unsigned packs_of_step = kChannelThreads - rows_of_step * packs;

  // Where this thread reads: it moves on by as many packs as the block has threads.
  const unsigned thread = threadIdx.x, row_of_thread = thread / packs;
  unsigned pack = thread - row_of_thread * packs;
  int64_t place = (partial * shape.outer + begin + row_of_thread) * row + channel * shape.inner +
                  int64_t{pack} * V;
  const int64_t step = rows_of_step * row + packs_of_step * V, wrap = row - int64_t{packs} * V;
  const auto next = [&] {
    const int64_t first = place;
    pack += packs_of_step, place += step;
    if (pack >= packs) pack -= packs, place += wrap;
    return first;
  };
  const int64_t rest = planes * packs - thread;
  const int left = rest > 0 ? static_cast<int>((rest - 1) / kChannelThreads) + 1 : 0;
  const typename F::Channel known[1] = {f.channel(partial, channel)};
  M all[1] = {};
  if constexpr (V == kVector<typename F::T>) {
    __shared__ uint4 stages[kPiecesStaged<F>];
    take_in_staged<V>(f, stages, left, next, known, all);
  } else {
    take_in<8, V>(f, left, next, known, all);
  }
  const M found = reduce.all(all[0]);
  if (threadIdx.x == 0) entries[unit * shape.count + channel] = found;
}

// ---- merging ----

// entries[partial][rows][channels] -> one result for each channel of each partial, a warp on each.
template <class F>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_channels(const F f, const typename F::M* entries, int64_t rows, const Channels shape) {
  using M = typename F::M;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t result = int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / kWarp;
  if (result >= shape.partials * shape.count) return;
  const int64_t partial = result / shape.count, channel = result % shape.count;
  // May be read before the wait: the launch before has itself waited for what writes parameters.
  const auto parameters = f.parameters(result);
  const M* own = entries + partial * rows * shape.count + channel;
  wait_for_launches();
  const auto entry = [&](int64_t row) { return own[row * shape.count]; };
  const M merged = across_lanes(merge_range<kMergeRows>(int64_t{lane}, rows, kWarp, entry), kWarp);
  f.store(result, merged, parameters, shape, lane);
}

// ---- launching ----

// The largest power of two up to `most` that divides n.
inline int power_in(int64_t n, int most) {
  int power = 1;
  while (power < most && n % (2 * power) == 0) power *= 2;
  return power;
}

// A plan with tiles of columns, if rows of channels can be read in packs of N elements and channels
// are narrow; otherwise one without packs. A channel has at most `room` entries in scratch memory.
template <int N>
ChannelPlan plan_tiles(const Channels& shape, int64_t room) {
  ChannelPlan plan;
  const int64_t width = shape.count * shape.inner;
  if (shape.inner == 1) {
    constexpr int kTile = N * kWarp;
    const int64_t whole = N / power_in(width, N);  // rows of channels that make whole packs
    if (whole > room || (shape.partials > 1 && shape.outer * width % N != 0)) return {};
    plan.packs = kWarp;
    plan.fold = width < kTile ? kTile / power_in(width, kTile) : whole;
    if (plan.fold > std::min(shape.outer, room)) plan.fold = whole;
    plan.tiles = ceil_div(width * plan.fold, int64_t{plan.packs} * N);
    return plan;
  }
  int64_t channels = N / power_in(shape.inner, N);  // that make whole packs
  if (width % N != 0 || channels * shape.inner / N > kChannelThreads) return {};
  while (2 * channels * shape.inner / N <= kChannelThreads && channels < shape.count) channels *= 2;
  plan.packs = static_cast<int>(channels * shape.inner / N);
  plan.tiles = ceil_div(width, int64_t{plan.packs} * N);
  return plan;
}

// How many members leave the device the least idle in the last wave of blocks; at least `waves`
// waves of `resident` blocks.
inline int64_t even_members(int64_t tiles, int64_t resident, int waves) {
  const int64_t least = std::max<int64_t>(1, waves * resident / tiles);
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
  size_t bytes = scratch_size * sizeof(typename F::A);
  M* const entries = static_cast<M*>(std::align(alignof(M), sizeof(M), scratch, bytes));
  if (entries == nullptr) return cudaErrorInvalidValue;
  // How many entries each channel of a partial has room for.
  const int64_t room = static_cast<int64_t>(bytes / sizeof(M)) / shape.results();
  if (room < 1) return cudaErrorInvalidValue;
  ChannelPlan plan = vector == N ? plan_tiles<N>(shape, room) : ChannelPlan{};
  Status status;
  if (plan.packs > 0) {
    const int64_t rows = ceil_div(shape.outer, plan.fold);
    const int64_t rows_at_once = kChannelThreads / plan.packs;
    const int64_t resident = resident_blocks(Grid{0, kChannelThreads}, reduce_columns<F>);
    plan.members =
        std::max<int64_t>(1, std::min({even_members(shape.partials * plan.tiles, resident, 1),
                                       room / plan.fold, ceil_div(rows, rows_at_once)}));
    plan.each = rows / (plan.members * rows_at_once);
    plan.rest = rows % (plan.members * rows_at_once);
    status = launch(stream, {shape.partials * plan.members * plan.tiles, kChannelThreads},
                    reduce_columns<F>, f, shape, plan, entries);
  } else {
    // Whole packs, halves of them, or one by one.
    const int fits = std::min(vector, power_in(shape.inner, N));
    const int by = fits * 2 < N ? 1 : fits;
    if (shape.inner / by > kMaxGrid - kChannelThreads) return cudaErrorInvalidValue;
    const auto kernel = by == N  ? reduce_planes<F, N>
                        : by > 1 ? reduce_planes<F, (N + 1) / 2>
                                 : reduce_planes<F, 1>;
    const int64_t resident = resident_blocks(Grid{0, kChannelThreads}, kernel);
    plan.packs = static_cast<int>(shape.inner / by);
    // Eight waves even out how fast blocks of planes are; those of a single one all wait for the
    // last.
    plan.members = std::max<int64_t>(
        1, std::min({even_members(shape.results(), resident, 8), room, shape.outer,
                     shape.outer * shape.inner / (int64_t{by} * kChannelThreads)}));
    plan.each = shape.outer / plan.members;
    plan.rest = shape.outer % plan.members;
    status = launch(stream, {shape.results() * plan.members, kChannelThreads}, kernel, f, shape,
                    plan, entries);
  }
  if (status != kSuccess) return status;
  return launch(stream, {ceil_div(shape.results(), int64_t{kMergeWarps}), kMergeWarps * kWarp},
                merge_channels<F>, f, entries, plan.members * plan.fold, shape);
}

template <class F>
Status load_channels() {
  constexpr int N = kVector<typename F::T>;
  return load_kernels(reduce_columns<F>, reduce_planes<F, N>, reduce_planes<F, (N + 1) / 2>,
                      reduce_planes<F, 1>, merge_channels<F>);
}

}  // namespace syntonic
