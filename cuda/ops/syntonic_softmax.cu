#include "ops/syntonic_softmax.cuh"

namespace syntonic {

// syntonic_softmax_planes.cu
Status syntonic_softmax_planes(Stream stream, const SyntonicSoftmax& call);
Status load_syntonic_softmax_planes(DType dtype);
// syntonic_softmax_cotangent.cu
Status load_syntonic_softmax_cotangent(DType dtype);

namespace {

template <class T>
using Arguments = SoftmaxArguments<T>;

// Aligned rows of whole packs, K packs a thread.
template <bool kPlain, class T, int K>
__global__ void __launch_bounds__(kMaxThreads, K == 8 ? 1 : 2) softmax_rows(const Arguments<T> a) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = team.number();
  const int packs = row < a.rows ? a.width / N : 0;
  const int64_t group = a.group(row);
  const RowStart start = {row < a.rows ? row * a.width : 0, group * a.width, a.width};
  const A scale = a.logits.scale_of(group);

  Packed<T, N> x[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int pack = k * team.size + team.rank;
    x[k] = pack < packs ? read_pack<T, N>(a.logits.x + start.elements + pack * N)
                        : lowest_pack<T, N>();
  }
  A z[K][N];
  uint32_t present[K], any = 0;
  MaxSum<A> own;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int pack = k * team.size + team.rank;
    if (kPlain || pack < packs) {
      present[k] = logits_of<kPlain>(a.logits, scale, start, pack * N, x[k], z[k]);
    } else {
      present[k] = 0;
      hide_absent(0, z[k], -kInfinity<A>);
    }
    any |= pack < packs ? present[k] : 0;
    if (!kPlain) take_max(own.max, z[k]);
  }
  if constexpr (kPlain) {
    Packed<T, N> top = x[0];
#pragma unroll
    for (int k = 1; k < K; ++k) raise(top, x[k]);
    own.max = largest(top);
  }
  const A base = MaxSum<A>::base(own.max);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const A y = lifted_exponential<T>(z[k][e] - base);
      own.sum += y;
      if (!a.log) z[k][e] = y;
    }
  }
  own.sum /= kLift<T>;
  tell_apart(own, any);
  const MaxSum<A> total = reduce.all(own);
  const Outcome<T> outcome(a, team.rank == 0 && row < a.rows, row, total);
  const A share = total.share(own.max) / kLift<T>;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int pack = k * team.size + team.rank;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      z[k][e] = a.log ? (z[k][e] - total.max) - outcome.log_sum : z[k][e] * share;
    }
    if (!kPlain && present[k] != kAll<N>) {
      hide_absent(present[k], z[k], a.log ? -kInfinity<A> : A(0));
    }
    if (pack < packs) write_pack(a.y + start.elements + pack * N, syntonic::pack<T>(z[k]));
  }
}

// Rows of any width and alignment that fit into the shared memory of a cluster, on their way
// through it. A thread copies and reads only packs of its own.
template <bool kPlain, class T>
__global__ void __launch_bounds__(kStageThreads, 3) softmax_staged(const Arguments<T> a) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  extern __shared__ uint4 pieces[];
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = team.number();
  const Stretch<T> of = stretch_of_row(a.logits.x, row, a.rows, a.width, true);
  const int64_t group = a.group(row);
  const RowStart start = {of.start, group * a.width, a.width};
  const A scale = a.logits.scale_of(group);
  const T* const packs = a.logits.x + of.start + of.head;
  uint4* const stage = stage_of(pieces, packs);
  Packed<T, N> held[kHeldPacks];
  fetch_packs(held, stage, packs, of.packs, team);
  const auto for_each = [&](auto&& f) {
    for_packs(
        of.packs, team, [&](int pack, int h) { f(pack, held[h]); },
        [&](int pack, int piece) {
          Packed<T, N> x = staged<T, N>(stage + piece, 1);
          f(pack, x);
        });
  };
  const auto replace_each = [&](auto&& f) {
    for_packs(
        of.packs, team, [&](int pack, int h) { f(pack, held[h]); },
        [&](int pack, int piece) {
          Packed<T, N> x = staged<T, N>(stage + piece, 1);
          f(pack, x);
          put_back(stage + piece, x);
        });
  };

  MaxSum<A> own;
  uint32_t any = 0;
  A edge = -kInfinity<A>;
  const bool has_edge = team.rank < of.edges();
  const int at_edge = of.edge(team.rank);
  if (has_edge) {
    bool present;
    edge = logit_at(a.logits, scale, start, at_edge, present);
    any |= present;
    own.max = edge;
  }
  const auto read = [&](int pack, const Packed<T, N>& x, A(&z)[N]) {
    return logits_of<kPlain>(a.logits, scale, start, of.first(pack), x, z);
  };
  wait_copies(0);
  if constexpr (kPlain) {
    Packed<T, N> top = lowest_pack<T, N>();
    for_each([&](int, const Packed<T, N>& x) { raise(top, x); });
    own.max = larger(own.max, largest(top));
    any |= of.packs > team.rank;
  } else {
    for_each([&](int pack, const Packed<T, N>& x) {
      A z[N];
      any |= read(pack, x, z);
      take_max(own.max, z);
    });
  }
  const A base = MaxSum<A>::base(own.max);
  own.sum = term<T>(edge - base);
  // Exponentials take the place of their logits, if they fit.
  const bool replace = kPlain && sizeof(T) == sizeof(A) && !a.log;
  if (replace) {
    replace_each([&](int pack, Packed<T, N>& x) {
      A z[N];
      read(pack, x, z);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        z[e] = term<T>(z[e] - base);
        own.sum += z[e];
      }
      x = syntonic::pack<T>(z);
    });
  } else {
    for_each([&](int pack, const Packed<T, N>& x) {
      A z[N];
      read(pack, x, z);
      add_terms<T>(own.sum, base, z);
    });
  }
  tell_apart(own, any);
  const MaxSum<A> total = reduce.all(own);
  const Outcome<T> outcome(a, team.rank == 0, row, total);
  const A share = total.share(own.max);
  for_each([&](int pack, const Packed<T, N>& x) {
    A z[N];
    const uint32_t present = read(pack, x, z);
    if (replace) {
#pragma unroll
      for (int e = 0; e < N; ++e) z[e] *= share;
      write_pack(a.y + of.start + of.first(pack), syntonic::pack<T>(z));
    } else {
      outcome.store(a, of.start + of.first(pack), present, z);
    }
  });
  if (has_edge) {
    const bool present = !a.logits.mask || a.logits.mask[of.start + at_edge];
    a.y[of.start + at_edge] = narrow<T>(outcome.of(a, edge, present));
  }
}

// Rows of any width, read twice, the second time from the L2 cache if it holds them.
template <class T>
__global__ void __launch_bounds__(kStreamThreads)
    softmax_stream(const Arguments<T> a, bool vector) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = team.number();
  const Stretch<T> of = stretch_of_row(a.logits.x, row, a.rows, a.width, vector);
  const LogitStream<false, T> logits(a.logits, of, a.group(row), a.width);

  const Outcome<T> outcome(a, team.rank == 0 && row < a.rows, row,
                           reduce.all(logits.max_sum(team)));
#pragma unroll 2
  for (int pack = team.rank; pack < of.packs; pack += team.size) {
    A z[N];
    const uint32_t present = logits.read(pack, logits.raw(pack), z);
    outcome.store(a, of.start + of.first(pack), present, z);
  }
  for (int i = team.rank; i < of.edges(); i += team.size) {
    bool present;
    const A z = logits.edge(i, present);
    a.y[of.start + of.edge(i)] = narrow<T>(outcome.of(a, z, present));
  }
}

template <bool kPlain, class T>
Status run_held(Stream stream, const SyntonicSoftmax& call) {
  const Planes& shape = call.logits.shape;
  const RowPlan plan = plan_rows(shape.width, kVector<T>, softmax_rows<kPlain, T, 4>,
                                 kPlain ? kPlainSoftmax : kSoftmax);
  const Arguments<T> arguments(call, plan.team);
  const Grid grid = grid_of_rows(plan, shape.rows());
  if constexpr (kPlain) {
    if (plan.packs == 2) return launch(stream, grid, softmax_rows<kPlain, T, 2>, arguments);
  }
  return launch(stream, grid, softmax_rows<kPlain, T, 4>, arguments);
}

template <bool kPlain, class T>
Status run_staged(Stream stream, const SyntonicSoftmax& call, const StagePlan& plan) {
  return launch(stream, plan.grid(call.logits.shape.rows()), softmax_staged<kPlain, T>,
                Arguments<T>(call, plan.team()));
}

template <class T>
Status run_rows(Stream stream, const SyntonicSoftmax& call) {
  const SoftmaxLogits& logits = call.logits;
  const int64_t width = logits.shape.width;
  const bool vector = alike(logits.x, logits.weights, call.y);
  if constexpr (kHeld<T>) {
    const bool whole = vector && width % kVector<T> == 0 && all_aligned(logits.x);
    if (whole && width / kVector<T> <= kRowPacks) {
      return plain(logits) ? run_held<true, T>(stream, call) : run_held<false, T>(stream, call);
    }
    if (vector && !whole && width <= kTileWidth) return syntonic_softmax_planes(stream, call);
    const StagePlan plan =
        plan_stages(width * sizeof(T), 1, kLargeCluster, softmax_staged<true, T>);
    if (vector && plan.blocks > 0) {
      return plain(logits) ? run_staged<true, T>(stream, call, plan)
                           : run_staged<false, T>(stream, call, plan);
    }
  }
  const RowPlan plan = plan_stream<T>(width, logits.shape.rows());
  return launch(stream, grid_of_rows(plan, logits.shape.rows()), softmax_stream<T>,
                Arguments<T>(call, plan.team), vector);
}

}  // namespace

Status syntonic_softmax(Stream stream, const SyntonicSoftmax& call) {
  if (call.logits.shape.elements() == 0) return kSuccess;
  if (call.logits.shape.inner > 1) return syntonic_softmax_planes(stream, call);
  return with_type(call.logits.dtype, [&](auto type) {
    return run_rows<typename decltype(type)::type>(stream, call);
  });
}

Status load_syntonic_softmax(DType dtype) {
  Status status = with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    Status status = load_kernels(softmax_stream<T>);
    if constexpr (kHeld<T>) {
      if (status == kSuccess) {
        status = load_kernels(softmax_rows<true, T, 2>, softmax_rows<true, T, 4>,
                              softmax_rows<false, T, 4>);
      }
      if (status == kSuccess) status = load_large(softmax_staged<true, T>);
      if (status == kSuccess) status = load_large(softmax_staged<false, T>);
    }
    return status;
  });
  if (status == kSuccess) status = load_syntonic_softmax_planes(dtype);
  return status == kSuccess ? load_syntonic_softmax_cotangent(dtype) : status;
}

}  // namespace syntonic
