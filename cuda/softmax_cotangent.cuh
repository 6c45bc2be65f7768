// The cotangents of softmax, log softmax and cross entropy, which differ in what the probabilities
// p are read from and in how much of them a row takes back:
//   softmax         d_z = p (ct - s),    s = sum(p ct)
//   log softmax     d_z = ct - p s,      s = sum(ct)
//   cross entropy   d_z = s (p - hit),   s the cotangent of the loss, hit 1 at the label
#pragma once

#include "column.cuh"
#include "softmax.cuh"

namespace syntonic {

enum class Pull { softmax, log_softmax, cross_entropy };

template <class T>
struct PullArguments {
  using A = Acc<T>;

  Logits<T> logits;
  const T* y;             // softmax
  const A* max;           // the others
  const A* log_sum;       // the others
  const T* ct;            // not of a cross entropy
  const int32_t* labels;  // cross entropy
  const A* row_ct;        // cross entropy
  T* d_z;                 // null: the column sums alone
  A* row_sums;            // where s is kept for the column sums; may be null
  int64_t rows;
  int64_t group_rows;
  int width;
  int64_t inner;
  int team;
  bool shifted;

  __device__ int64_t group(int64_t row) const { return row < rows ? row / group_rows : 0; }
  __device__ A scale(int64_t group) const { return logits.weights ? logits.scale[group] : A(0); }
};

// What a pack of a row needs to know of the row.
template <class T>
struct PullRow {
  Acc<T> scale = 0;
  Acc<T> max = 0;
  Acc<T> log_sum = 0;
  int label = -1;

  template <Pull kPull>
  __device__ static PullRow of(const PullArguments<T>& a, int64_t row, int64_t group) {
    PullRow known;
    if (row >= a.rows) return known;
    known.scale = a.scale(group);
    if (kPull != Pull::softmax) known.max = a.max[row], known.log_sum = a.log_sum[row];
    if (kPull == Pull::cross_entropy) known.label = a.labels[row];
    return known;
  }
};

// Probabilities from logits; what does not count has none.
template <class T, int N>
__device__ void to_probabilities(const PullRow<T>& row, uint32_t present, Acc<T> (&z)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    z[e] = present >> e & 1 ? exp((z[e] - row.max) - row.log_sum) : Acc<T>(0);
  }
}

// p and ct of a pack of a row, both 0 where an element does not count. Returns which do.
template <Pull kPull, class T, int N>
__device__ uint32_t load_pull(const PullArguments<T>& a, const PullRow<T>& row, int64_t start,
                              int64_t parameters, const Span& at, bool vector, Acc<T> (&p)[N],
                              Acc<T> (&ct)[N]) {
  uint32_t present;
  if constexpr (kPull == Pull::softmax) {
    present = present_in<N>(a.logits.mask, start, at, vector);
    unpack(load<T, N, Cache::keep>(a.y + start, at, vector), p);
#pragma unroll
    for (int e = 0; e < N; ++e) p[e] = present >> e & 1 ? p[e] : Acc<T>(0);
  } else {
    present = load_logits(a.logits, row.scale, start, parameters, at, vector, p);
    to_probabilities(row, present, p);
  }
  if constexpr (kPull != Pull::cross_entropy) {
    unpack(load<T, N, Cache::keep>(a.ct + start, at, vector), ct);
#pragma unroll
    for (int e = 0; e < N; ++e) ct[e] = present >> e & 1 ? ct[e] : Acc<T>(0);
  }
  return present;
}

template <Pull kPull, class A>
__device__ A row_term(A p, A ct) {
  return kPull == Pull::softmax ? p * ct : ct;
}

// d_z of a pack, in place of p. `label`: where in the stretch of the row the label is.
template <Pull kPull, class A, int N>
__device__ void pull(A s, int label, const Span& at, uint32_t present, const A (&ct)[N],
                     A (&p)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if constexpr (kPull == Pull::softmax) {
      p[e] *= ct[e] - s;
    } else if constexpr (kPull == Pull::log_softmax) {
      p[e] = ct[e] - p[e] * s;
    } else {
      p[e] = s * (at.first + e * at.step - at.begin == label ? p[e] - A(1) : p[e]);
    }
    if (!(present >> e & 1)) p[e] = A(0);
  }
}

// Rows of whole packs that fit, K packs a thread, on a persistent grid. The column sums gather in
// registers.
template <Pull kPull, class T, int K>
__global__ void __launch_bounds__(kMaxThreads)
    pull_rows(const PullArguments<T> a, const Workers workers, Acc<T>* sums, int64_t stride) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Sum<A>> exchange;
  __shared__ A shared[N * kMaxThreads];
  const Team team(a.team);
  Reducer<Sum<A>> reduce(exchange, team);
  const int64_t step = workers.members * team.count;
  for (int64_t unit = blockIdx.x / team.blocks; unit < workers.partials * workers.members;
       unit += gridDim.x / team.blocks) {
    const int64_t partial = unit / workers.members;
    const int64_t end = (partial + 1) * workers.rows;
    A d_bias[K][N] = {};
    // All teams of the block make the same number of turns, `first` being the row of the first.
    int64_t first = partial * workers.rows + unit % workers.members * team.count;
    for (; first < end; first += step) {
      const int64_t row = first + team.index;
      const RowAccess<N> access(true, false, row, end, a.width);
      const int64_t group = row < end ? a.group(row) : 0;
      const PullRow<T> known = PullRow<T>::template of<kPull>(a, row < end ? row : a.rows, group);
      A p[K][N], ct[K][N];
      uint32_t present[K];
      Sum<A> sum;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        present[k] = load_pull<kPull>(a, known, access.start, group * a.width, access.at(k, team),
                                      true, p[k], ct[k]);
#pragma unroll
        for (int e = 0; e < N; ++e) sum.value += row_term<kPull>(p[k][e], ct[k][e]);
      }
      const A s = reduce.all(sum).value;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const Span at = access.at(k, team);
        pull<kPull>(s, -1, at, present[k], ct[k], p[k]);
        if (a.d_z) store(a.d_z + access.start, at, true, pack<T>(p[k]));
        if (!sums) continue;
#pragma unroll
        for (int e = 0; e < N; ++e) d_bias[k][e] += p[k][e];
      }
    }
    if (!sums) continue;
    const RowAccess<N> access(true, false, 0, 1, a.width);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      add_teams(team, d_bias[k], shared);
      if (team.index == 0) {
        store(sums + unit * stride, access.at(k, team), true, pack<A>(d_bias[k]));
      }
    }
    if (team.count > 1) __syncthreads();  // before `shared` is filled again
  }
}

// Rows of any width. Those of a cross entropy are read once; the others twice, the second time from
// the L2 cache if it holds them.
template <Pull kPull, class T>
__global__ void __launch_bounds__(kMaxThreads) pull_stream(const PullArguments<T> a, bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Sum<A>> exchange;
  const Team team(a.team);
  Reducer<Sum<A>> reduce(exchange, team);
  const int64_t row = int64_t{blockIdx.x} / team.blocks * team.count + team.index;
  const RowAccess<N> access(aligned, a.shifted, row, a.rows, a.width);
  const int64_t group = a.group(row), parameters = group * a.width - access.begin;
  const PullRow<T> known = PullRow<T>::template of<kPull>(a, row, group);
  const int turns = access.turns(team);
  A s = 0;
  int label = -1;
  bool any = row < a.rows;  // or the loss is no function of the logits
  if constexpr (kPull == Pull::cross_entropy) {
    label = known.label;
    any = any && label_counts(a.logits, row, a.width, label);
    if (any) s = a.row_ct[row];
  } else {
    Sum<A> sum;
#pragma unroll 4
    for (int turn = 0; turn < turns; ++turn) {
      A p[N], ct[N];
      load_pull<kPull>(a, known, access.start, parameters, access.at(turn, team), aligned, p, ct);
#pragma unroll
      for (int e = 0; e < N; ++e) sum.value += row_term<kPull>(p[e], ct[e]);
    }
    s = reduce.all(sum).value;
    if (a.row_sums && team.rank == 0 && row < a.rows) a.row_sums[row] = s;
  }
  if (!a.d_z) return;
#pragma unroll 4
  for (int turn = 0; turn < turns; ++turn) {
    const Span at = access.at(turn, team);
    A p[N] = {}, ct[N];
    if (any) {
      const uint32_t present =
          load_pull<kPull>(a, known, access.start, parameters, at, aligned, p, ct);
      pull<kPull>(s, label, at, present, ct, p);
    }
    store(a.d_z + access.start, at, aligned, pack<T>(p));
  }
}

// The column sums alone, for rows too wide for registers: a block takes a tile of 32 packs of
// columns and every members-th group of rows. `row_sums` holds s.
template <Pull kPull, class T>
__global__ void __launch_bounds__(kMaxThreads)
    pull_columns(const PullArguments<T> a, const Workers workers, Acc<T>* sums, int64_t stride,
                 bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  constexpr int kTile = N * kWarp;
  __shared__ A shared[N * kMaxThreads];
  const Team team(kWarp);
  const int tiles = (a.width + kTile - 1) / kTile;
  const int64_t unit = blockIdx.x / tiles;
  const int offset = static_cast<int>(blockIdx.x % tiles) * kTile;
  const int64_t partial = unit / workers.members;
  const int64_t end = (partial + 1) * workers.rows;
  const int columns = a.width - offset < kTile ? a.width - offset : kTile;
  const Span at = span<N>(aligned, 0, kWarp, team.rank, columns);
  A d_bias[N] = {};
#pragma unroll 2
  for (int64_t row = partial * workers.rows + unit % workers.members * team.count + team.index;
       row < end; row += workers.members * team.count) {
    const int64_t group = a.group(row);
    const PullRow<T> known = PullRow<T>::template of<kPull>(a, row, group);
    const A s = kPull == Pull::cross_entropy ? a.row_ct[row] : a.row_sums[row];
    if (kPull == Pull::cross_entropy && !label_counts(a.logits, row, a.width, known.label))
      continue;
    A p[N], ct[N];
    const uint32_t present = load_pull<kPull>(a, known, row * a.width + offset,
                                              group * a.width + offset, at, aligned, p, ct);
    pull<kPull>(s, known.label - offset, at, present, ct, p);
#pragma unroll
    for (int e = 0; e < N; ++e) d_bias[e] += p[e];
  }
  add_teams(team, d_bias, shared);
  if (team.index == 0) store(sums + unit * stride + offset, at, aligned, pack<A>(d_bias));
}

// Launches pull_columns for the sums over rows of every partial.
template <Pull kPull, class T>
Status sum_columns(Stream stream, const PullArguments<T>& arguments, bool aligned, int64_t partials,
                   Acc<T>* d_bias, Acc<T>* scratch, int64_t scratch_size) {
  using A = Acc<T>;
  const int64_t tiles = ceil_div(arguments.width, kVector<T> * kWarp);
  const int64_t resident =
      ceil_div(resident_blocks(Grid{0, kMaxThreads}, pull_columns<kPull, T>), tiles);
  const Workers workers = plan_workers(partials, arguments.rows / partials, kMaxThreads / kWarp,
                                       resident, arguments.width, scratch_size);
  return gather_columns(stream, workers, arguments.width, FoldTargets<A>{d_bias, nullptr}, scratch,
                        [&](const FoldTargets<A>& sums, int64_t stride) {
                          const int64_t blocks = tiles * workers.partials * workers.members;
                          return launch(stream, {blocks, kMaxThreads}, pull_columns<kPull, T>,
                                        arguments, workers, sums.first, stride, aligned);
                        });
}

}  // namespace syntonic
