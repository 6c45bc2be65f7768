// The backward pass of a norm over rows.
#pragma once

#include "ops/norm_cotangent_pack.cuh"

namespace syntonic {
namespace norm_cotangent {

// Rows that fit, K packs a thread. The parameter gradients gather in registers.
template <class Norm, int K, bool kWhole_, int kRows_ = 1>
struct PullBack {
  using T = typename Norm::T;
  using A = Acc<T>;
  using Arguments = norm_cotangent::Arguments<Norm>;
  using Sums = norm_cotangent::Sums<A>;
  // Zeros of a row that does not exist: no NaN may reach the sums.
  using Known = typename Norm::Statistics;
  using Row = typename Norm::Normal;
  using Measure = typename Norm::Products;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = K;
  static constexpr int kRows = kRows_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kThreads = K == 1 ? kFewThreads : kMaxThreads;
  static constexpr int kBlocks = K == 1 ? 2 : 1;
  static constexpr bool kHoldScale = K <= 2;  // more would not fit into the registers

  const Arguments& a;
  RowPacks<T, K, kWhole> packs;
  int64_t parameters;
  HeldParameter<A, N, kHoldScale ? K : 0> scale;
  A d_scale[K][N] = {}, d_bias[K][N] = {};
  A inverse_width;

  __device__ PullBack(const Arguments& a, const Team& team, int64_t row, int64_t partial)
      : a(a),
        packs(team, static_cast<int>(a.width), row),
        parameters(partial / a.partials_per_group * a.width - packs.begin),
        scale(a.scale, partial / a.partials_per_group * a.width, A(1), packs),
        inverse_width(A(1) / a.width) {}

  __device__ Known known(int64_t row) const { return a.statistics[row]; }

  // z, ct_z where there is one, and ct_y, in this order.
  __device__ void fetch(const Slot& slot, int64_t row, bool exists) const {
    const int64_t start = exists ? packs.start(row) : 0;
    const auto how = packs.how(row, a.rows);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const auto at = packs.at(k, exists);
      uint4* const pack = slot.pack(k);
      stage<T, N>(pack, slot.stride, a.z + start, at, how);
      if (a.ct_z) stage<T, N>(pack + slot.stride, slot.stride, a.ct_z + start, at, how);
      stage_any<T, N>(a.ct_y, pack + a.ct_y_piece * slot.stride, slot.stride, start, at, how);
    }
  }

  // What it adds to the sums along the row, and across it.
  __device__ Measure measure(const Slot& slot, const Row& normal, int64_t, bool) {
    Measure sums;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A xhat[N], ct[N], scale[N];
      read(slot, k, xhat, ct);
      normalise(xhat, normal);
      if constexpr (!kWhole) {
        const uint32_t present = packs.present(k);
        if (present != kAll<N>) {
          hide_absent(present, xhat, A(0));
          hide_absent(present, ct, A(0));
        }
      }
      scale_of(k, scale);
      Norm::add(sums, xhat, ct, scale);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        d_scale[k][e] += ct[e] * xhat[e];
        if constexpr (Norm::kBias) d_bias[k][e] += ct[e];
      }
    }
    return sums;
  }

  __device__ void finish(const Slot& slot, const Row& normal, int64_t row, bool exists,
                         Measure means) const {
    Norm::for_each(means, [&](A& mean) { mean *= inverse_width; });
    const typename Norm::Across across(normal, means);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A x[N], ct[N], scale[N];
      read(slot, k, x, ct);
      scale_of(k, scale);
      Packed<T, N> ct_z = {};
      if (a.ct_z) ct_z = staged<T, N>(slot.pack(k) + slot.stride, slot.stride);
      store_gradients(a, packs.start(row), packs.at(k, exists), kWhole,
                      normal.slope() * a.scale_factor, x, ct, scale, ct_z, across);
    }
  }

  __device__ void leave(const Sums& sums, int64_t part, uint4* dynamic) {
    A* const shared = reinterpret_cast<A*>(dynamic);
    const int64_t start = part * sums.stride;
    if (!kWhole && packs.team.count > 1) {
      if (sums.d_scale) {
        add_ragged_teams(packs, d_scale, shared, [&](int column, A sum) {
          sums.d_scale[start + column] = sum * a.scale_factor;
        });
      }
      if (Norm::kBias && sums.d_bias) {
        add_ragged_teams(packs, d_bias, shared,
                         [&](int column, A sum) { sums.d_bias[start + column] = sum; });
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      store_sums(a, packs.team, sums, start - packs.begin, packs.columns(k), kWhole, d_scale[k],
                 d_bias[k], shared);
    }
  }

 private:
  __device__ void read(const Slot& slot, int k, A (&x)[N], A (&ct)[N]) const {
    const uint4* const pack = slot.pack(k);
    unpack(staged<T, N>(pack, slot.stride), x);
    unpack_staged<T>(a.ct_y, pack + a.ct_y_piece * slot.stride, slot.stride, ct);
  }
  __device__ void scale_of(int k, A (&x)[N]) const {
    if constexpr (kHoldScale) return scale.read(k, x);
    load_scale(a, parameters, packs.columns(k), packs.how_columns(), x);
  }
};

// Rows of any width, without parameter gradients: read twice, the second time from the L2 cache if
// it holds them.
template <class Norm>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back_stream(const Arguments<Norm> a, bool aligned) {
  wait_for_launches();
  using T = typename Norm::T;
  using A = Acc<T>;
  using Products = typename Norm::Products;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Products> exchange;
  const Team team(a.team);
  Reducer<Products> reduce(exchange, team);
  const int64_t row = team.number();
  const int64_t start = row * a.width;
  const int64_t parameters = row / a.group_rows * a.width;
  const typename Norm::Normal normal(a.statistics[row]);
  const int stretch = N * team.size;
  const auto span_at = [&](int64_t offset) {
    const int64_t end = a.width - offset < stretch ? a.width - offset : stretch;
    return span<N>(aligned, 0, team.size, team.rank, static_cast<int>(end));
  };
  const auto read = [&](int64_t offset, const Span& at, A(&x)[N], A(&ct)[N], A(&scale)[N]) {
    unpack(load<T, N>(a.z + start + offset, at, aligned), x);
    unpack_any(load_any<A, N>(a.ct_y, start + offset, at, aligned), a.ct_y.dtype, ct);
    load_scale(a, parameters + offset, at, aligned, scale);
  };

  Products means;
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    A xhat[N], ct[N], scale[N];
    read(offset, span_at(offset), xhat, ct, scale);
    normalise(xhat, normal);
    Norm::add(means, xhat, ct, scale);
  }
  means = reduce.all(means);
  Norm::for_each(means, [&](A& mean) { mean /= a.width; });
  const A slope = normal.slope() * a.scale_factor;
  const typename Norm::Across across(normal, means);
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    Packed<T, N> ct_z = {};
    if (a.ct_z) ct_z = load<T, N>(a.ct_z + start + offset, at, aligned);
    A x[N], ct[N], scale[N];
    read(offset, at, x, ct, scale);
    store_gradients(a, start + offset, at, aligned, slope, x, ct, scale, ct_z, across);
  }
}

// The parameter gradients of rows of any width: a team of one warp for each tile of columns.
template <class Norm>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back_columns(const Arguments<Norm> a, const Workers workers,
                      const Sums<typename Norm::A> sums, bool aligned) {
  wait_for_launches();
  using T = typename Norm::T;
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  constexpr int kTile = N * kWarp;
  __shared__ A shared[N * kMaxThreads];
  const Team team(kWarp);
  const int64_t tiles = (a.width + kTile - 1) / kTile;
  const int64_t unit = blockIdx.x / tiles, offset = blockIdx.x % tiles * kTile;
  const int64_t partial = unit / workers.members;
  const int64_t end = (partial + 1) * workers.rows;
  const int columns = a.width - offset < kTile ? static_cast<int>(a.width - offset) : kTile;
  const Span at = span<N>(aligned, 0, kWarp, team.rank, columns);
  A d_scale[N] = {}, d_bias[N] = {};
#pragma unroll 4
  for (int64_t row = partial * workers.rows + unit % workers.members * team.count + team.index;
       row < end; row += workers.members * team.count) {
    const int64_t start = row * a.width + offset;
    A xhat[N], ct[N];
    unpack(load<T, N>(a.z + start, at, aligned), xhat);
    normalise(xhat, typename Norm::Normal(a.statistics[row]));
    unpack_any(load_any<A, N>(a.ct_y, start, at, aligned), a.ct_y.dtype, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      d_scale[e] += ct[e] * xhat[e];
      if constexpr (Norm::kBias) d_bias[e] += ct[e];
    }
  }
  store_sums(a, team, sums, unit * sums.stride + offset, at, aligned, d_scale, d_bias, shared);
}

template <class Norm, int K, bool kWhole, bool kEarly = false, int R = 1>
constexpr auto pull_back = rows_in_ring<PullBack<Norm, K, kWhole, R>, kEarly>;

template <class Norm>
constexpr auto tuned_kernel_for(const RowPlan& plan, bool whole) {
  if (!whole) {
    return plan.rows == 2 ? pull_back<Norm, 2, false, false, 2> : pull_back<Norm, 2, false>;
  }
  if constexpr (sizeof(typename Norm::T) == 2) {  // what the tables for wider types do not ask for
    if (plan.packs == 3) return pull_back<Norm, 3, true>;
    if (plan.packs == 1 && plan.early) return pull_back<Norm, 1, true, true>;
  }
  if (plan.rows == 2) return pull_back<Norm, 2, true, false, 2>;
  return plan.packs == 1   ? pull_back<Norm, 1, true>
         : plan.packs == 4 ? pull_back<Norm, 4, true>
         : plan.early      ? pull_back<Norm, 2, true, true>
                           : pull_back<Norm, 2, true>;
}

// Of what is not tuned the two kernels that its tables ask for.
template <class Norm>
constexpr auto kernel_for(const RowPlan& plan, bool whole) {
  if constexpr (Norm::kTuned) {
    return tuned_kernel_for<Norm>(plan, whole);
  } else {
    return whole ? pull_back<Norm, 2, true, true> : pull_back<Norm, 2, false>;
  }
}

template <class T>
bool vector_access(const NormRowsCotangent& call) {
  return call.rows.width % kVector<T> == 0 &&
         all_aligned(call.z, call.scale, call.ct_y, call.ct_z, call.d_identity, call.d_residual,
                     call.d_scale, call.d_bias, call.scratch);
}

template <class Norm>
const RowTuning& tuning(const NormRowsCotangent& call) {
  using T = typename Norm::T;
  const bool whole = vector_access<T>(call);
  if (!Norm::kTuned) return whole ? kUntunedCotangent : kUntunedCotangentRagged;
  if (!whole) return kCotangentRagged;
  if (sizeof(T) == 2) return call.ct_z ? kCotangent16 : kPlainCotangent16;
  return call.ct_z ? kCotangent : kPlainCotangent;
}

template <class A>
FoldTargets<A> targets(const NormRowsCotangent& call) {
  return {static_cast<A*>(call.d_scale), static_cast<A*>(call.d_bias)};
}

inline Workers workers_of(const NormRowsCotangent& call, int teams, int64_t resident,
                          int phases = 1) {
  const int64_t sums = (call.d_scale != nullptr) + (call.d_bias != nullptr);
  return plan_workers(call.partials, call.rows.total() / call.partials, teams, resident,
                      call.rows.width * sums, call.scratch_size, phases);
}

// sum(sums) launches one kernel in which every unit of work stores its column sums.
template <class A, class F>
Status gather(Stream stream, const NormRowsCotangent& call, const Workers& workers, F&& sum) {
  return gather_columns(stream, workers, call.rows.width, targets<A>(call), call.scratch,
                        [&](const FoldTargets<A>& sums, int64_t stride) {
                          return sum(Sums<A>{sums.first, sums.second, stride});
                        });
}

template <class Norm>
Status run_stream(Stream stream, const NormRowsCotangent& call, const RowPlan& plan) {
  using T = typename Norm::T;
  using A = Acc<T>;
  const Arguments<Norm> arguments(call, plan);
  const bool aligned = vector_access<T>(call);
  if (call.d_identity || call.d_residual) {
    const int cluster = cluster_size(plan);
    const Status status = launch(stream, {call.rows.total() * cluster, plan.threads, cluster},
                                 pull_back_stream<Norm>, arguments, aligned);
    if (status != kSuccess) return status;
  }
  if (!call.d_scale && !call.d_bias) return kSuccess;
  const int64_t tiles = ceil_div(call.rows.width, kVector<T> * kWarp);
  const int64_t resident =
      ceil_div(resident_blocks(Grid{0, kMaxThreads}, pull_back_columns<Norm>), tiles);
  const Workers workers = workers_of(call, kMaxThreads / kWarp, resident);
  return gather<A>(stream, call, workers, [&](const Sums<A>& sums) {
    const int64_t blocks = tiles * workers.partials * workers.members;
    return launch(stream, {blocks, kMaxThreads}, pull_back_columns<Norm>, arguments, workers, sums,
                  aligned);
  });
}

template <class Norm>
Status run(Stream stream, const NormRowsCotangent& call, RowPlan plan) {
  using T = typename Norm::T;
  using A = Acc<T>;
  const Arguments<Norm> arguments(call, plan);
  const bool whole = vector_access<T>(call);
  const bool packs = all_aligned(call.z, call.ct_y, call.ct_z, call.d_identity, call.d_residual);
  const auto kernel = kernel_for<Norm>(plan, whole);
  // Without d_identity and d_residual there is nothing to reduce along a row.
  if (plan.packs > 0 && packs && (call.d_identity || call.d_residual)) {
    const size_t ring =
        fit_ring(plan, kernel, plan.rows, arguments.pieces, call.rows.width * sizeof(T));
    const int teams = teams_per_block(plan);
    Grid grid = {0, plan.threads, cluster_size(plan), ring};
    const int64_t resident = resident_blocks(grid, kernel) / grid.cluster;
    const Workers workers =
        workers_of(call, teams, resident, whole ? 1 : phases(call.rows.width, kVector<T>));
    if (ring > 0 && workers.members > 0 && fits_device(grid, kernel)) {
      return gather<A>(stream, call, workers, [&](const Sums<A>& sums) {
        const int64_t units = workers.partials * workers.members;
        grid.blocks = std::min(units, resident) * grid.cluster;
        return launch(stream, grid, kernel, arguments, workers, sums, plan.stages);
      });
    }
  }
  const RowPlan block = {0, kMaxThreads, kMaxThreads};
  return run_stream<Norm>(stream, call, plan.packs == 0 ? plan : block);
}

}  // namespace norm_cotangent

template <template <class> class Norm>
Status norm_rows_cotangent(Stream stream, const NormRowsCotangent& call) {
  if (call.rows.elements() == 0) {
    const size_t bytes = call.partials * call.rows.width * item_size(accumulation(call.dtype));
    Status status = kSuccess;
    for (void* sums : {call.d_scale, call.d_bias}) {
      if (sums && bytes && status == kSuccess) status = cudaMemsetAsync(sums, 0, bytes, stream);
    }
    return status;
  }
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = norm_cotangent::kernel_for<Norm<T>>({.packs = 2}, true);
    const RowPlan plan =
        plan_rows(call.rows.width, kVector<T>, kernel, norm_cotangent::tuning<Norm<T>>(call));
    return norm_cotangent::run<Norm<T>>(stream, call, plan);
  });
}

template <template <class> class Norm>
Status load_norm_rows_cotangent(DType dtype) {
  using namespace norm_cotangent;
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    using Of = Norm<T>;
    Status status = kSuccess;
    const auto load = [&](const RowPlan& plan, bool whole) {
      if (status == kSuccess) status = load_large(kernel_for<Of>(plan, whole));
    };
    for (const int packs : {1, 2, 3, 4}) {
      for (const bool early : {false, true}) load({.packs = packs, .early = early}, true);
    }
    for (const bool whole : {false, true}) load({.packs = 2, .rows = 2}, whole);
    load({.packs = 2}, false);
    if (status != kSuccess) return status;
    return load_kernels(pull_back_stream<Of>, pull_back_columns<Of>, fold_columns<Acc<T>>);
  });
}

}  // namespace syntonic
