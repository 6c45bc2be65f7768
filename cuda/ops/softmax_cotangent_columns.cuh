// The column sums of the cotangents of a softmax or a cross entropy, for rows too wide for
// registers: everything is read a second time.
#pragma once

#include "ops/softmax_cotangent.cuh"

namespace syntonic {

// A block takes a tile of 32 packs of columns and every members-th group of rows; `row_sums` holds
// s.
template <Pull kPull, class T>
__global__ void __launch_bounds__(kMaxThreads)
    pull_column_sums(const PullArguments<T> a, const Workers workers, Acc<T>* sums, int64_t stride,
                     bool aligned) {
  wait_for_launches();
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
    const PullRow<kPull, T> of(a, row);
    const A s = kPull == Pull::cross_entropy ? a.row_ct[row] : a.row_sums[row];
    if (kPull == Pull::cross_entropy && !label_counts(a.logits, row, a.width, of.label)) continue;
    if (aligned) {
      if (at.first >= at.end) continue;
      const int first = offset + at.first;
      A p[N], ct[N];
      const uint32_t present =
          of.template read<false>(first, of.raw(first), of.raw_ct(first), p, ct);
      of.pull(s, first, present, ct, p);
#pragma unroll
      for (int e = 0; e < N; ++e) d_bias[e] += p[e];
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (!at.holds(e)) continue;
        const int place = offset + at.first + e * at.step;
        A p, ct;
        const bool present = of.read_at(place, p, ct);
        d_bias[e] += of.pull_at(s, place, present, ct, p);
      }
    }
  }
  add_teams(team, d_bias, shared);
  if (team.index == 0) store(sums + unit * stride + offset, at, aligned, pack<A>(d_bias));
}

// Launches pull_column_sums for the sums over rows of every partial.
template <Pull kPull, class T>
Status sum_columns(Stream stream, const PullArguments<T>& arguments, bool aligned, int64_t partials,
                   Acc<T>* d_bias, Acc<T>* scratch, int64_t scratch_size) {
  const int64_t tiles = ceil_div(arguments.width, kVector<T> * kWarp);
  const int64_t resident =
      ceil_div(resident_blocks(Grid{0, kMaxThreads}, pull_column_sums<kPull, T>), tiles);
  const Workers workers = plan_workers(partials, arguments.rows / partials, kMaxThreads / kWarp,
                                       resident, arguments.width, scratch_size);
  return gather_columns(stream, workers, arguments.width, FoldTargets<Acc<T>>{d_bias, nullptr},
                        scratch, [&](const FoldTargets<Acc<T>>& sums, int64_t stride) {
                          const int64_t blocks = tiles * workers.partials * workers.members;
                          return launch(stream, {blocks, kMaxThreads}, pull_column_sums<kPull, T>,
                                        arguments, workers, sums.first, stride, aligned);
                        });
}

}  // namespace syntonic
