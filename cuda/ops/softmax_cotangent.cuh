// The cotangents of softmax, log softmax and cross entropy. They differ in what the probabilities p
// are computed from, and in the number s that each row has:
//   softmax         d_z = p (ct - s),    s = sum(p ct)
//   log softmax     d_z = ct - p s,      s = sum(ct)
//   cross entropy   d_z = s (p - hit),   s the cotangent of the loss, hit 1 at the label
#pragma once

#include "engine/column_sums.cuh"
#include "ops/softmax_row.cuh"

namespace syntonic {

enum class Pull { softmax, log_softmax, cross_entropy };

template <class T>
struct PullArguments {
  using A = Acc<T>;

  Logits<T> logits;       // x: that of a softmax is its result y
  const A* max;           // not of a softmax
  const A* log_sum;       // not of a softmax
  const T* ct;            // not of a cross entropy
  const int32_t* labels;  // cross entropy
  const A* row_ct;        // cross entropy
  T* d_z;                 // null: the column sums alone
  A* row_sums;            // the s of every row, for the column sums; may be null
  int64_t rows;
  int64_t group_rows;  // 0: one group, no division needed
  int width;
  int team;  // threads of a row; along an inner axis the blocks of a plane

  __device__ int64_t group(int64_t row) const {
    return group_rows == 0 || row >= rows ? 0 : row / group_rows;
  }
};

template <class T>
PullArguments<T> pull_arguments(const SyntonicSoftmaxCotangent& call, int team) {
  using A = Acc<T>;
  const Planes& shape = call.logits.shape;
  SoftmaxLogits logits = call.logits;
  if (call.y) logits.x = call.y;
  return {.logits = Logits<T>(logits),
          .max = static_cast<const A*>(call.max),
          .log_sum = static_cast<const A*>(call.log_sum),
          .ct = static_cast<const T*>(call.ct),
          .labels = nullptr,
          .row_ct = nullptr,
          .d_z = static_cast<T*>(call.d_z),
          .row_sums = nullptr,
          .rows = shape.rows(),
          .group_rows = shape.groups == 1 ? 0 : shape.outer * shape.inner,
          .width = static_cast<int>(shape.width),
          .team = team};
}

// What an element adds to s.
template <Pull kPull, class A>
__device__ A pull_term(A p, A ct) {
  return kPull == Pull::softmax ? p * ct : ct;
}

// d_z of an element; of a cross entropy, p is less by one at the label.
template <Pull kPull, class A>
__device__ A pulled(A s, A p, A ct) {
  if (kPull == Pull::softmax) return p * (ct - s);
  if (kPull == Pull::log_softmax) return ct - p * s;
  return s * p;
}

// What a row has for all its elements: where it begins, and its numbers. Computes p, then d_z.
template <Pull kPull, class T>
struct PullRow {
  using A = Acc<T>;
  static constexpr int N = kVector<T>;

  const PullArguments<T>& a;
  RowStart start;
  A scale = 0;
  A max = 0;
  A log_sum = 0;
  int label = -1;

  __device__ PullRow(const PullArguments<T>& a, int64_t row)
      : a(a), start{row * a.width, a.group(row) * a.width, a.width} {
    if (row >= a.rows) return;
    scale = a.logits.scale_of(a.group(row));
    if (kPull != Pull::softmax) max = a.max[row], log_sum = a.log_sum[row];
    if (kPull == Pull::cross_entropy) label = a.labels[row];
  }

  // p and ct of a pack of x, which begins with element `at` of the row; both 0 where an element
  // does not count. Returns which do.
  template <bool kPlain>
  __device__ uint32_t read(int at, const Packed<T, N>& x, const Packed<T, N>& cts, A (&p)[N],
                           A (&ct)[N]) const {
    uint32_t present = kAll<N>;
    unpack(cts, ct);
    if constexpr (kPull == Pull::softmax) {
      unpack(x, p);
      if (!kPlain && a.logits.mask) present = read_mask<N>(a.logits.mask + start.elements + at);
    } else {
      present = logits_of<kPlain>(a.logits, scale, start, at, x, p);
#pragma unroll
      for (int e = 0; e < N; ++e) p[e] = exponential<T>((p[e] - max) - log_sum);
    }
    if (!kPlain && present != kAll<N>) {
      hide_absent(present, p, A(0));
      hide_absent(present, ct, A(0));
    }
    return present;
  }

  // The same for one element.
  __device__ bool read_at(int at, A& p, A& ct) const {
    bool present = true;
    if constexpr (kPull == Pull::softmax) {
      present = !a.logits.mask || a.logits.mask[start.elements + at];
      p = static_cast<A>(a.logits.x[start.elements + at]);
    } else {
      p = logit_at(a.logits, scale, start, at, present);
      p = exponential<T>((p - max) - log_sum);
    }
    ct = kPull == Pull::cross_entropy ? A(0) : static_cast<A>(a.ct[start.elements + at]);
    if (!present) p = ct = A(0);
    return present;
  }

  __device__ Packed<T, N> raw(int at) const {
    return read_pack<T, N>(a.logits.x + start.elements + at);
  }
  __device__ Packed<T, N> raw_ct(int at) const {
    if constexpr (kPull == Pull::cross_entropy) return {};
    return read_pack<T, N>(a.ct + start.elements + at);
  }

  // d_z of a pack, in place of p.
  __device__ void pull(A s, int at, uint32_t present, const A (&ct)[N], A (&p)[N]) const {
    if (kPull == Pull::cross_entropy && static_cast<unsigned>(label - at) < N) {
#pragma unroll
      for (int e = 0; e < N; ++e) p[e] -= at + e == label ? A(1) : A(0);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) p[e] = pulled<kPull>(s, p[e], ct[e]);
    // Masked elements are 0 already, unless s is NaN.
    if (present != kAll<N>) hide_absent(present, p, A(0));
  }
  __device__ A pull_at(A s, int at, bool present, A ct, A p) const {
    if (kPull == Pull::cross_entropy && at == label) p -= A(1);
    return present ? pulled<kPull>(s, p, ct) : A(0);
  }
};

// Aligned rows of whole packs, K packs a thread, on a persistent grid. Column sums are kept in
// registers. kPlain: there are none, and no mask.
template <Pull kPull, bool kPlain, class T, int K>
__global__ void __launch_bounds__(kMaxThreads, kPlain ? 2 : 1)
    pull_rows(const PullArguments<T> a, const Workers workers, Acc<T>* sums, int64_t stride) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Sum<A>> exchange;
  __shared__ A shared[kPlain ? 1 : N * kMaxThreads];
  const Team team(a.team);
  Reducer<Sum<A>> reduce(exchange, team);
  const int64_t step = workers.members * team.count;
  const int packs = a.width / N;
  for (int64_t unit = cluster_index(); unit < workers.partials * workers.members;
       unit += gridDim.x / team.blocks) {
    const int64_t partial = unit / workers.members;
    const int64_t end = (partial + 1) * workers.rows;
    A d_bias[K][N] = {};
    // All teams of the block make the same number of turns, `first` being the row of the first.
    int64_t first = partial * workers.rows + unit % workers.members * team.count;
    for (; first < end; first += step) {
      const int64_t row = first + team.index;
      const PullRow<kPull, T> of(a, row < end ? row : a.rows);
      const int own = row < end ? packs : 0;
      Packed<T, N> x[K], cts[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int pack = k * team.size + team.rank;
        x[k] = cts[k] = {};
        if (pack < own) x[k] = of.raw(pack * N), cts[k] = of.raw_ct(pack * N);
      }
      const auto read = [&](int k, A(&p)[N], A(&ct)[N]) {
        return of.template read<kPlain>((k * team.size + team.rank) * N, x[k], cts[k], p, ct);
      };
      Sum<A> sum;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k * team.size + team.rank >= own) continue;
        A p[N], ct[N];
        read(k, p, ct);
#pragma unroll
        for (int e = 0; e < N; ++e) sum.value += pull_term<kPull>(p[e], ct[e]);
      }
      const A s = reduce.all(sum).value;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int at = (k * team.size + team.rank) * N;
        if (at >= own * N) continue;
        A p[N], ct[N];
        const uint32_t present = read(k, p, ct);
        of.pull(s, at, present, ct, p);
        if (a.d_z) write_pack(a.d_z + of.start.elements + at, pack<T>(p));
        if constexpr (!kPlain) {
#pragma unroll
          for (int e = 0; e < N; ++e) d_bias[k][e] += p[e];
        }
      }
    }
    if constexpr (!kPlain) {
      if (!sums) continue;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        add_teams(team, d_bias[k], shared);
        const int pack = k * team.size + team.rank;
        if (team.index == 0 && pack < packs) {
          write_pack(sums + unit * stride + pack * N, syntonic::pack<A>(d_bias[k]));
        }
      }
      if (team.count > 1) __syncthreads();  // before `shared` is filled again
    }
  }
}

// Rows of any width and alignment, staged together with their cotangents. A thread reads only what
// it has copied itself.
template <Pull kPull, class T>
__global__ void __launch_bounds__(kStageThreads, 3) pull_staged(const PullArguments<T> a) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  extern __shared__ uint4 pieces[];
  __shared__ Exchange<Sum<A>> exchange;
  const Team team(a.team);
  Reducer<Sum<A>> reduce(exchange, team);
  const int64_t row = team.number();
  const PullRow<kPull, T> of(a, row);
  const Stretch<T> packs = stretch_of_row(a.logits.x, row, a.rows, a.width, true);
  const T* const x = a.logits.x + packs.start + packs.head;
  const T* const cts = a.ct + packs.start + packs.head;
  uint4* const x_stage = stage_of(pieces, x);
  const int64_t room = kLine + stage_pieces(packs.packs, team.blocks, team.size / team.blocks);
  uint4* const ct_stage = stage_of(pieces + room, cts);
  Packed<T, N> held[kHeldPacks], held_ct[kHeldPacks];
  fetch_packs(held, x_stage, x, packs.packs, team);
  fetch_packs(held_ct, ct_stage, cts, packs.packs, team);
  const auto for_each = [&](auto&& f) {
    for_packs(
        packs.packs, team, [&](int pack, int h) { f(pack, held[h], held_ct[h]); },
        [&](int pack, int piece) {
          f(pack, staged<T, N>(x_stage + piece, 1), staged<T, N>(ct_stage + piece, 1));
        });
  };

  Sum<A> sum;
  const int edge = packs.edge(team.rank);
  const bool has_edge = team.rank < packs.edges();
  A edge_p = 0, edge_ct = 0;
  bool edge_present = false;
  if (has_edge) {
    edge_present = of.read_at(edge, edge_p, edge_ct);
    sum.value = pull_term<kPull>(edge_p, edge_ct);
  }
  using Pack = Packed<T, N>;
  wait_copies(0);
  for_each([&](int pack, const Pack& of_x, const Pack& of_ct) {
    A p[N], ct[N];
    of.template read<false>(packs.first(pack), of_x, of_ct, p, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) sum.value += pull_term<kPull>(p[e], ct[e]);
  });
  const A s = reduce.all(sum).value;
  if (a.row_sums && team.rank == 0) a.row_sums[row] = s;
  if (!a.d_z) return;
  for_each([&](int pack, const Pack& of_x, const Pack& of_ct) {
    A p[N], ct[N];
    const uint32_t present = of.template read<false>(packs.first(pack), of_x, of_ct, p, ct);
    of.pull(s, packs.first(pack), present, ct, p);
    write_pack(a.d_z + packs.start + packs.first(pack), syntonic::pack<T>(p));
  });
  if (has_edge) {
    a.d_z[packs.start + edge] = narrow<T>(of.pull_at(s, edge, edge_present, edge_ct, edge_p));
  }
}

// Rows of any width, read twice, the second time from the L2 cache if it holds them.
template <Pull kPull, class T>
__global__ void __launch_bounds__(kStreamThreads)
    pull_stream(const PullArguments<T> a, bool vector) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Sum<A>> exchange;
  const Team team(a.team);
  Reducer<Sum<A>> reduce(exchange, team);
  const int64_t row = team.number();
  const Stretch<T> packs = stretch_of_row(a.logits.x, row, a.rows, a.width, vector);
  const PullRow<kPull, T> of(a, row);
  const auto read = [&](int pack, A(&p)[N], A(&ct)[N]) {
    const int at = packs.first(pack);
    return of.template read<false>(at, of.raw(at), of.raw_ct(at), p, ct);
  };
  Sum<A> sum;
#pragma unroll 4
  for (int pack = team.rank; pack < packs.packs; pack += team.size) {
    A p[N], ct[N];
    read(pack, p, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) sum.value += pull_term<kPull>(p[e], ct[e]);
  }
  for (int i = team.rank; i < packs.edges(); i += team.size) {
    A p, ct;
    of.read_at(packs.edge(i), p, ct);
    sum.value += pull_term<kPull>(p, ct);
  }
  const A s = reduce.all(sum).value;
  if (a.row_sums && team.rank == 0 && row < a.rows) a.row_sums[row] = s;
  if (!a.d_z) return;
#pragma unroll 4
  for (int pack = team.rank; pack < packs.packs; pack += team.size) {
    A p[N], ct[N];
    const uint32_t present = read(pack, p, ct);
    of.pull(s, packs.first(pack), present, ct, p);
    write_pack(a.d_z + packs.start + packs.first(pack), syntonic::pack<T>(p));
  }
  for (int i = team.rank; i < packs.edges(); i += team.size) {
    const int at = packs.edge(i);
    A p, ct;
    const bool present = of.read_at(at, p, ct);
    a.d_z[packs.start + at] = narrow<T>(of.pull_at(s, at, present, ct, p));
  }
}

}  // namespace syntonic
