#include "ops/softmax_plane.cuh"
#include "ops/syntonic_softmax.cuh"

namespace syntonic {
namespace {

template <class T>
using Arguments = SoftmaxArguments<T>;

template <bool kPlain, class T>
__global__ void __launch_bounds__(kPlaneThreads)
    softmax_tile(const Arguments<T> a, const PlaneShape shape) {
  wait_for_launches();
  using A = Acc<T>;
  extern __shared__ uint4 pieces[];
  const Tile<T> tile(pieces, a.logits.x, shape);
  tile.copy_from(a.logits.x);
  const TileRow of(shape);
  const PlaneLogits<kPlain, T> logits(a.logits, shape, of.plane);
  wait_copies(0);
  __syncthreads();

  MaxSum<A> own;
  bool any = false;
  const auto read = [&](int w, int i, bool& present) {
    return logits.one(w, tile.of.start + i, tile.data[i], present);
  };
  of.for_elements(shape, [&](int w, int i) {
    bool present;
    own.max = larger(own.max, read(w, i, present));
    any = any || present;
  });
  const A base = MaxSum<A>::base(own.max);
  of.for_elements(shape, [&](int w, int i) {
    bool present;
    own.sum += term<T>(read(w, i, present) - base);
  });
  tell_apart(own, any);
  const Outcome<T> outcome(a, of.any && of.slot == 0, of.row, across_lanes(own, of.slots));
  of.for_elements(shape, [&](int w, int i) {
    bool present;
    const A z = read(w, i, present);
    tile.data[i] = narrow<T>(outcome.of(a, z, present));
  });
  __syncthreads();
  tile.copy_to(a.y);
}

template <bool kPlain, class T>
__global__ void __launch_bounds__(kPlaneThreads, 3)
    softmax_columns(const Arguments<T> a, const PlaneShape shape) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  extern __shared__ uint4 pieces[];
  __shared__ RowExchange<MaxSum<A>> exchange;
  const int blocks = a.team;
  if (blocks > 1) cluster_begin();
  const ColumnPlace<T> of(shape, blocks);
  of.for_packs(shape, [&](int, int64_t element, int piece) {
    copy_async<16>(pieces + piece, 1, a.logits.x + element, true);
  });
  commit_copies();
  const PlaneLogits<kPlain, T> logits(a.logits, shape, of.plane);
  const auto read = [&](int w, int64_t element, int piece, A(&z)[N]) {
    return logits.pack(w, element, staged<T, N>(pieces + piece, 1), z);
  };
  MaxSum<A> own[N];
  uint32_t any = 0;
  wait_copies(0);
  of.for_packs(shape, [&](int w, int64_t element, int piece) {
    A z[N];
    any |= read(w, element, piece, z);
#pragma unroll
    for (int e = 0; e < N; ++e) own[e].max = larger(own[e].max, z[e]);
  });
  A base[N];
#pragma unroll
  for (int e = 0; e < N; ++e) base[e] = MaxSum<A>::base(own[e].max);
  of.for_packs(shape, [&](int w, int64_t element, int piece) {
    A z[N];
    read(w, element, piece, z);
#pragma unroll
    for (int e = 0; e < N; ++e) own[e].sum += term<T>(z[e] - base[e]);
  });
#pragma unroll
  for (int e = 0; e < N; ++e) tell_apart(own[e], any >> e & 1);
  exchange_columns(
      exchange, shape.lanes, blocks, own,
      [&](const auto& m) { return across_lanes(m, kWarp, shape.lanes); },
      [](auto a, auto b) { return MaxSum<A>::merge(a, b); },
      [&](int i, const MaxSum<A>& total) -> MaxSum<A> {
        // Kept in place of maximum and sum: what the results are relative to, and their factor.
        const bool keep = i < of.rest + of.lane * N && cluster_rank() == 0;
        const Outcome<T> outcome(a, keep, of.row - of.lane * N + i, total);
        return {a.log ? total.max : outcome.base, a.log ? outcome.log_sum : outcome.share};
      });
  of.for_packs(shape, [&](int w, int64_t element, int piece) {
    A z[N];
    const uint32_t present = read(w, element, piece, z);
    if (a.log) {
#pragma unroll
      for (int e = 0; e < N; ++e) z[e] = (z[e] - own[e].max) - own[e].sum;
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) z[e] = lifted_exponential<T>(z[e] - own[e].max) * own[e].sum;
    }
    if (present != kAll<N>) hide_absent(present, z, a.log ? -kInfinity<A> : A(0));
    write_pack(a.y + element, pack<T>(z));
  });
}

template <bool kPlain, class T>
__global__ void __launch_bounds__(kPlaneThreads)
    softmax_strided(const Arguments<T> a, const PlaneShape shape) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int kTurn = 8;
  __shared__ RowExchange<MaxSum<A>> exchange;
  const int blocks = a.team;
  if (blocks > 1) cluster_begin();
  const StridedRow of(shape, blocks);
  const PlaneLogits<kPlain, T> logits(a.logits, shape, of.plane);
  const auto read = [&](int w, bool& present) {
    const int64_t element = of.start + int64_t{w} * shape.inner;
    return logits.one(w, element, a.logits.x[element], present);
  };
  const int end = of.any ? shape.width : 0;
  MaxSum<A> own;
  bool any = false;
  for (int w = of.slot; w < end; w += kTurn * of.slots) {
    A z[1][kTurn];
#pragma unroll
    for (int k = 0; k < kTurn; ++k) {
      bool present = false;
      z[0][k] = w + k * of.slots < end ? read(w + k * of.slots, present) : -kInfinity<A>;
      any = any || present;
    }
    own.template extend<T>(z);
  }
  tell_apart(own, any);
  const MaxSum<A> total = exchange_row(exchange, shape.lanes, blocks, own,
                                       [](auto a, auto b) { return MaxSum<A>::merge(a, b); });
  const Outcome<T> outcome(a, of.any && of.slot == 0, of.row, total);
#pragma unroll 8
  for (int w = of.slot; w < end; w += of.slots) {
    bool present;
    const A z = read(w, present);
    a.y[of.start + int64_t{w} * shape.inner] = narrow<T>(outcome.of(a, z, present));
  }
}

template <class T>
Status run(Stream stream, const SyntonicSoftmax& call) {
  const Planes& shape = call.logits.shape;
  const bool vector = alike(call.logits.x, call.logits.weights, call.y), bare = plain(call.logits);
  const auto go = [&](int64_t clusters, int threads, int cluster, size_t shared, const auto kernel,
                      int lanes) {
    const Grid grid = {clusters * cluster, threads, cluster, shared};
    return launch(stream, grid, kernel, Arguments<T>(call, cluster), plane_shape(shape, lanes));
  };
  if constexpr (kHeld<T>) {
    if (vector && shape.inner % kVector<T> == 0 && all_aligned(call.logits.x)) {
      const ColumnPlan plan = plan_columns<T>(shape, 1, softmax_columns<true, T>);
      if (plan.stage.blocks > 0) {
        return go(plan.count(shape, kVector<T>), plan.stage.threads, plan.stage.blocks,
                  plan.stage.shared, bare ? softmax_columns<true, T> : softmax_columns<false, T>,
                  plan.lanes);
      }
    }
    const int planes = tile_planes(shape, sizeof(T));
    if (vector && planes > 0) {
      const PlaneShape tile = plane_shape(shape, planes);
      return go(ceil_div(tile.planes, planes), tile_threads(tile), 1,
                sizeof(uint4) * tile_pieces<T>(tile),
                bare ? softmax_tile<true, T> : softmax_tile<false, T>, planes);
    }
  }
  const StreamPlan plan = plan_strided_rows(shape, softmax_strided<true, T>);
  return go(plan.count, kPlaneThreads, plan.blocks, 0,
            bare ? softmax_strided<true, T> : softmax_strided<false, T>, plan.lanes);
}

}  // namespace

Status syntonic_softmax_planes(Stream stream, const SyntonicSoftmax& call) {
  return with_type(call.logits.dtype,
                   [&](auto type) { return run<typename decltype(type)::type>(stream, call); });
}

Status load_syntonic_softmax_planes(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    Status status = load_kernels(softmax_strided<true, T>, softmax_strided<false, T>);
    if constexpr (kHeld<T>) {
      const auto load = [&](auto kernel) {
        if (status == kSuccess) status = load_with_dynamic_shared(kernel);
      };
      load(softmax_tile<true, T>);
      load(softmax_tile<false, T>);
      load(softmax_columns<true, T>);
      load(softmax_columns<false, T>);
    }
    return status;
  });
}

}  // namespace syntonic
