#include "ops/softmax_cotangent.cuh"
#include "ops/softmax_plane.cuh"

namespace syntonic {
namespace {

// p and ct of elements number w of N rows from `row` on, as PullRow has those of a row.
template <Pull kPull, class T, int N>
struct PullNeighbours {
  using A = Acc<T>;
  static constexpr int V = kVector<T>;
  const PullArguments<T>& a;
  PlaneLogits<false, T> logits;
  A max[N];
  A log_sum[N];

  __device__ PullNeighbours(const PullArguments<T>& a, const PlaneShape& shape, int64_t plane,
                            int64_t row, bool any)
      : a(a), logits(a.logits, shape, plane) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      max[e] = log_sum[e] = 0;
      if (kPull != Pull::softmax && any) max[e] = a.max[row + e], log_sum[e] = a.log_sum[row + e];
    }
  }

  // Of a pack from each of x and ct.
  __device__ uint32_t read(int w, int64_t element, const Packed<T, V>& x, const Packed<T, V>& cts,
                           A (&p)[V], A (&ct)[V]) const {
    static_assert(N == V);
    uint32_t present = kAll<V>;
    unpack(cts, ct);
    if constexpr (kPull == Pull::softmax) {
      unpack(x, p);
      if (a.logits.mask) present = read_mask<V>(a.logits.mask + element);
    } else {
      present = logits.pack(w, element, x, p);
#pragma unroll
      for (int e = 0; e < V; ++e) p[e] = exponential<T>((p[e] - max[e]) - log_sum[e]);
    }
    if (present != kAll<V>) {
      hide_absent(present, p, A(0));
      hide_absent(present, ct, A(0));
    }
    return present;
  }

  // Of one element.
  __device__ bool read_one(int w, int64_t element, T x, T cts, A& p, A& ct) const {
    bool present = true;
    p = static_cast<A>(x);
    if constexpr (kPull == Pull::softmax) {
      present = !a.logits.mask || a.logits.mask[element];
    } else {
      p = exponential<T>((logits.one(w, element, x, present) - max[0]) - log_sum[0]);
    }
    ct = static_cast<A>(cts);
    if (!present) p = ct = A(0);
    return present;
  }
};

template <Pull kPull, class T>
__global__ void __launch_bounds__(kPlaneThreads)
    pull_tile(const PullArguments<T> a, const PlaneShape shape) {
  wait_for_launches();
  using A = Acc<T>;
  extern __shared__ uint4 pieces[];
  const Tile<T> tile(pieces, a.logits.x, shape);
  const Tile<T> cts(pieces + tile_pieces<T>(shape), a.ct, shape);
  tile.copy_from(a.logits.x);
  cts.copy_from(a.ct);
  const TileRow of(shape);
  const PullNeighbours<kPull, T, 1> row(a, shape, of.plane, of.row, of.any);
  const auto read = [&](int w, int i, A& p, A& ct) {
    return row.read_one(w, tile.of.start + i, tile.data[i], cts.data[i], p, ct);
  };
  wait_copies(0);
  __syncthreads();
  Sum<A> own;
  of.for_elements(shape, [&](int w, int i) {
    A p, ct;
    read(w, i, p, ct);
    own.value += pull_term<kPull>(p, ct);
  });
  const A s = across_lanes(own, of.slots).value;
  of.for_elements(shape, [&](int w, int i) {
    A p, ct;
    const bool present = read(w, i, p, ct);
    tile.data[i] = narrow<T>(present ? pulled<kPull>(s, p, ct) : A(0));
  });
  __syncthreads();
  tile.copy_to(a.d_z);
}

template <Pull kPull, class T>
__global__ void __launch_bounds__(kPlaneThreads, 2)
    pull_columns(const PullArguments<T> a, const PlaneShape shape) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  extern __shared__ uint4 pieces[];
  __shared__ RowExchange<A> exchange;
  const int blocks = a.team;
  if (blocks > 1) cluster_begin();
  const ColumnPlace<T> of(shape, blocks);
  uint4* const cts = pieces + of.pieces(shape);
  of.for_packs(shape, [&](int, int64_t element, int piece) {
    copy_async<16>(pieces + piece, 1, a.logits.x + element, true);
    copy_async<16>(cts + piece, 1, a.ct + element, true);
  });
  commit_copies();
  const PullNeighbours<kPull, T, N> rows(a, shape, of.plane, of.row, of.any);
  const auto read = [&](int w, int64_t element, int piece, A(&p)[N], A(&ct)[N]) {
    return rows.read(w, element, staged<T, N>(pieces + piece, 1), staged<T, N>(cts + piece, 1), p,
                     ct);
  };
  A sum[N] = {};
  wait_copies(0);
  of.for_packs(shape, [&](int w, int64_t element, int piece) {
    A p[N], ct[N];
    read(w, element, piece, p, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] += pull_term<kPull>(p[e], ct[e]);
  });
  exchange_columns(
      exchange, shape.lanes, blocks, sum,
      [&](A x) { return across_lanes(Sum<A>{x}, kWarp, shape.lanes).value; },
      [](A a, A b) { return a + b; }, [](int, A total) { return total; });
  of.for_packs(shape, [&](int w, int64_t element, int piece) {
    A p[N], ct[N];
    const uint32_t present = read(w, element, piece, p, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) p[e] = pulled<kPull>(sum[e], p[e], ct[e]);
    if (present != kAll<N>) hide_absent(present, p, A(0));
    write_pack(a.d_z + element, pack<T>(p));
  });
}

template <Pull kPull, class T>
__global__ void __launch_bounds__(kPlaneThreads)
    pull_strided(const PullArguments<T> a, const PlaneShape shape) {
  wait_for_launches();
  using A = Acc<T>;
  __shared__ RowExchange<A> exchange;
  const int blocks = a.team;
  if (blocks > 1) cluster_begin();
  const StridedRow of(shape, blocks);
  const PullNeighbours<kPull, T, 1> row(a, shape, of.plane, of.row, of.any);
  const int end = of.any ? shape.width : 0;
  const auto read = [&](int64_t element, int w, A& p, A& ct) {
    return row.read_one(w, element, a.logits.x[element], a.ct[element], p, ct);
  };
  A sum = 0;
#pragma unroll 8
  for (int w = of.slot; w < end; w += of.slots) {
    A p, ct;
    read(of.start + int64_t{w} * shape.inner, w, p, ct);
    sum += pull_term<kPull>(p, ct);
  }
  const A s = exchange_row(exchange, shape.lanes, blocks, sum, [](A a, A b) { return a + b; });
#pragma unroll 8
  for (int w = of.slot; w < end; w += of.slots) {
    const int64_t element = of.start + int64_t{w} * shape.inner;
    A p, ct;
    const bool present = read(element, w, p, ct);
    a.d_z[element] = narrow<T>(present ? pulled<kPull>(s, p, ct) : A(0));
  }
}

template <Pull kPull, class T>
Status run(Stream stream, const SyntonicSoftmaxCotangent& call) {
  const Planes& shape = call.logits.shape;
  const PullArguments<T> given = pull_arguments<T>(call, 1);
  const T* x = given.logits.x;
  const bool vector = alike(x, given.logits.weights, given.ct, given.d_z);
  const auto go = [&](int64_t clusters, int threads, int cluster, size_t shared, const auto kernel,
                      int lanes) {
    PullArguments<T> arguments = given;
    arguments.team = cluster;
    const Grid grid = {clusters * cluster, threads, cluster, shared};
    return launch(stream, grid, kernel, arguments, plane_shape(shape, lanes));
  };
  if constexpr (kHeld<T>) {
    if (vector && shape.inner % kVector<T> == 0 && all_aligned(x)) {
      const ColumnPlan plan = plan_columns<T>(shape, 2, pull_columns<kPull, T>);
      if (plan.stage.blocks > 0) {
        return go(plan.count(shape, kVector<T>), plan.stage.threads, plan.stage.blocks,
                  plan.stage.shared, pull_columns<kPull, T>, plan.lanes);
      }
    }
    const int planes = tile_planes(shape, sizeof(T));
    if (vector && planes > 0) {
      const PlaneShape tile = plane_shape(shape, planes);
      return go(ceil_div(tile.planes, planes), tile_threads(tile), 1,
                2 * sizeof(uint4) * tile_pieces<T>(tile), pull_tile<kPull, T>, planes);
    }
  }
  const StreamPlan plan = plan_strided_rows(shape, pull_strided<kPull, T>);
  return go(plan.count, kPlaneThreads, plan.blocks, 0, pull_strided<kPull, T>, plan.lanes);
}

template <Pull kPull, class T>
Status load_kernels_of() {
  Status status = load_kernels(pull_strided<kPull, T>);
  if constexpr (kHeld<T>) {
    if (status == kSuccess) status = load_with_dynamic_shared(pull_tile<kPull, T>);
    if (status == kSuccess) status = load_with_dynamic_shared(pull_columns<kPull, T>);
  }
  return status;
}

}  // namespace

Status syntonic_softmax_planes_cotangent(Stream stream, const SyntonicSoftmaxCotangent& call) {
  if (call.d_bias) return cudaErrorInvalidValue;
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return call.y ? run<Pull::softmax, T>(stream, call) : run<Pull::log_softmax, T>(stream, call);
  });
}

Status load_syntonic_softmax_planes_cotangent(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    const Status status = load_kernels_of<Pull::softmax, T>();
    return status == kSuccess ? load_kernels_of<Pull::log_softmax, T>() : status;
  });
}

}  // namespace syntonic
