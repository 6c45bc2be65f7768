#include "column.cuh"
#include "phi_residual_layernorm.h"

namespace syntonic {
namespace {

template <class T>
struct Arguments {
  using A = Acc<T>;

  Arguments(const PhiResidualLayernormCotangent& call, const RowPlan& plan)
      : z(static_cast<const T*>(call.z)),
        mean(static_cast<const A*>(call.mean)),
        rstd(static_cast<const A*>(call.rstd)),
        scale(static_cast<const A*>(call.scale)),
        ct_y{const_cast<void*>(call.ct_y), call.y_dtype},
        ct_z(static_cast<const T*>(call.ct_z)),
        d_identity(static_cast<T*>(call.d_identity)),
        d_residual(static_cast<T*>(call.d_residual)),
        rows(call.rows.total()),
        width(call.rows.width),
        group_rows(call.rows.count),
        partials_per_group(call.partials / call.rows.groups),
        team(plan.team),
        identity_scale(static_cast<A>(call.identity_scale)),
        residual_scale(static_cast<A>(call.residual_scale)),
        scale_factor(static_cast<A>(call.scale_factor)) {}

  const T* z;
  const A* mean;
  const A* rstd;
  const A* scale;
  AnyArray ct_y;
  const T* ct_z;
  T* d_identity;
  T* d_residual;
  int64_t rows;
  int64_t width;
  int64_t group_rows;
  int64_t partials_per_group;
  int team;
  A identity_scale;
  A residual_scale;
  A scale_factor;
};

// Where each unit of work leaves its parameter gradients: the results themselves or scratch.
template <class A>
struct Sums {
  A* d_scale;
  A* d_bias;
  int64_t stride;  // from unit to unit
};

// ct_y has the type of the data, known at compile time, or Any, known at run time.
struct Any {};
template <class T, class Y>
using CtPack = std::conditional_t<std::is_same_v<Y, Any>, AnyPacked<Acc<T>, kVector<T>>,
                                  Packed<T, kVector<T>>>;

template <class Y, class T>
__device__ CtPack<T, Y> load_ct(const Arguments<T>& a, int64_t start, const Span& at, bool vector) {
  if constexpr (std::is_same_v<Y, Any>) {
    return load_any<Acc<T>, kVector<T>>(a.ct_y, start, at, vector);
  } else {
    return load<T, kVector<T>>(static_cast<const T*>(a.ct_y.data) + start, at, vector);
  }
}

// One pack of a row and what follows from it.
template <class T, class Y>
struct Element {
  static constexpr int N = kVector<T>;
  using A = Acc<T>;

  Packed<T, N> z;
  CtPack<T, Y> ct_y;
  Packed<T, N> ct_z;

  // Zero where the span ends, so that tails add nothing to any sum.
  __device__ void read(const Arguments<T>& a, int64_t start, const Span& at, bool vector) {
    z = load<T, N>(a.z + start, at, vector);
    ct_y = load_ct<Y>(a, start, at, vector);
    if (a.ct_z) ct_z = load<T, N>(a.ct_z + start, at, vector);
  }

  __device__ void normalised(A mean, A rstd, A (&xhat)[N]) const {
    unpack(z, xhat);
#pragma unroll
    for (int e = 0; e < N; ++e) xhat[e] = (xhat[e] - mean) * rstd;
  }

  __device__ void cotangent(const Arguments<T>& a, A (&ct)[N]) const {
    if constexpr (std::is_same_v<Y, Any>) {
      unpack_any(ct_y, a.ct_y.dtype, ct);
    } else {
      unpack(ct_y, ct);
    }
  }

  // dz = rstd * (w - mean(w) - xhat * mean(w * xhat)) + ct_z, given the two means.
  __device__ void write(const Arguments<T>& a, int64_t start, const Span& at, bool vector, A mean,
                        A rstd, const A (&scale)[N], const SumPair<A>& means) const {
    A xhat[N], dz[N], d[N];
    normalised(mean, rstd, xhat);
    cotangent(a, dz);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      dz[e] = rstd * (dz[e] * scale[e] - means.first - xhat[e] * means.second);
    }
    if (a.ct_z) {
      unpack(ct_z, d);
#pragma unroll
      for (int e = 0; e < N; ++e) dz[e] += d[e];
    }
    if (a.d_identity) {
#pragma unroll
      for (int e = 0; e < N; ++e) d[e] = a.identity_scale * dz[e];
      store(a.d_identity + start, at, vector, pack<T>(d));
    }
    if (a.d_residual) {
#pragma unroll
      for (int e = 0; e < N; ++e) d[e] = a.residual_scale * dz[e];
      store(a.d_residual + start, at, vector, pack<T>(d));
    }
  }
};

// scale * scale_factor for one pack.
template <class T>
__device__ void load_scale(const Arguments<T>& a, int64_t group_start, const Span& at, bool vector,
                           Acc<T> (&scale)[kVector<T>]) {
  constexpr int N = kVector<T>;
  if (a.scale) load_parameter(a.scale + group_start, at, vector, scale);
#pragma unroll
  for (int e = 0; e < N; ++e) scale[e] = a.scale ? scale[e] * a.scale_factor : a.scale_factor;
}

template <class T>
__device__ void store_sums(const Arguments<T>& a, Acc<T>* row, const Span& at, bool vector,
                           const Acc<T> (&sum)[kVector<T>]) {
  store(row, at, vector, pack<Acc<T>>(sum));
}

// Rows that fit, K packs a thread, on a persistent grid: the next row is on its way while this one
// is reduced, and the parameter gradients gather in registers.
template <class T, class Y, int K, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back(const Arguments<T> a, const Workers workers, const Sums<Acc<T>> sums) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<SumPair<A>> exchange;
  __shared__ A shared[N * kMaxThreads];
  const Team team(a.team);
  Reducer<SumPair<A>> reduce(exchange, team);
  const int width = static_cast<int>(a.width);
  const int64_t step = workers.members * team.count;

  for (int64_t unit = blockIdx.x / team.blocks; unit < workers.partials * workers.members;
       unit += gridDim.x / team.blocks) {
    const int64_t partial = unit / workers.members;
    const int64_t end = (partial + 1) * workers.rows;
    // The first row of the block; all its teams make the same number of turns.
    int64_t first = partial * workers.rows + unit % workers.members * team.count;
    const auto at = [&](int k, int64_t row) {
      return span<N>(kAligned, k, team.size, team.rank, row < end ? width : 0);
    };
    A scale[K][N], d_scale[K][N] = {}, d_bias[K][N] = {};
    Element<T, Y> next[K];
    A next_mean, next_rstd;
    const auto read = [&](int64_t row) {
#pragma unroll
      for (int k = 0; k < K; ++k) next[k].read(a, row * width, at(k, row), kAligned);
      // Zero for an idle team: the NaN of an earlier row must not reach its sums.
      next_mean = row < end ? a.mean[row] : A(0);
      next_rstd = row < end ? a.rstd[row] : A(0);
    };
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load_scale(a, partial / a.partials_per_group * width, at(k, partial * workers.rows), kAligned,
                 scale[k]);
    }
    read(first + team.index);
    for (; first < end; first += step) {
      const int64_t row = first + team.index;
      Element<T, Y> element[K];
#pragma unroll
      for (int k = 0; k < K; ++k) element[k] = next[k];
      const A mean = next_mean, rstd = next_rstd;
      read(row + step);
      SumPair<A> means;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        A xhat[N], ct[N];
        element[k].normalised(mean, rstd, xhat);
        element[k].cotangent(a, ct);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const A w = ct[e] * scale[k][e];
          means.first += w;
          means.second += w * xhat[e];
          d_scale[k][e] += ct[e] * xhat[e];
          d_bias[k][e] += ct[e];
        }
      }
      means = reduce(means);
      means.first /= width;
      means.second /= width;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        element[k].write(a, row * width, at(k, row), kAligned, mean, rstd, scale[k], means);
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Span columns = at(k, partial * workers.rows);
      if (sums.d_scale) {
        add_teams(team, d_scale[k], shared);
#pragma unroll
        for (int e = 0; e < N; ++e) d_scale[k][e] *= a.scale_factor;
        if (team.index == 0) {
          store_sums(a, sums.d_scale + unit * sums.stride, columns, kAligned, d_scale[k]);
        }
      }
      if (sums.d_bias) {
        add_teams(team, d_bias[k], shared);
        if (team.index == 0) {
          store_sums(a, sums.d_bias + unit * sums.stride, columns, kAligned, d_bias[k]);
        }
      }
    }
  }
}

// Rows of any width, without parameter gradients: read twice, the second time from the L2 cache if
// it holds them.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back_stream(const Arguments<T> a, bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<SumPair<A>> exchange;
  const Team team(a.team);
  Reducer<SumPair<A>> reduce(exchange, team);
  const int64_t row = int64_t{blockIdx.x} / team.blocks;
  const int64_t start = row * a.width;
  const int64_t parameters = row / a.group_rows * a.width;
  const A mean = a.mean[row], rstd = a.rstd[row];
  const int stretch = N * team.size;
  const auto span_at = [&](int64_t offset) {
    const int64_t end = a.width - offset < stretch ? a.width - offset : stretch;
    return span<N>(aligned, 0, team.size, team.rank, static_cast<int>(end));
  };

  SumPair<A> means;
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    Element<T, Any> element;
    A xhat[N], ct[N], scale[N];
    element.z = load<T, N>(a.z + start + offset, at, aligned);
    element.ct_y = load_ct<Any>(a, start + offset, at, aligned);
    load_scale(a, parameters + offset, at, aligned, scale);
    element.normalised(mean, rstd, xhat);
    element.cotangent(a, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const A w = ct[e] * scale[e];
      means.first += w;
      means.second += w * xhat[e];
    }
  }
  means = reduce(means);
  means.first /= a.width;
  means.second /= a.width;
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    Element<T, Any> element;
    A scale[N];
    element.read(a, start + offset, at, aligned);
    load_scale(a, parameters + offset, at, aligned, scale);
    element.write(a, start + offset, at, aligned, mean, rstd, scale, means);
  }
}

// The parameter gradients of rows of any width: a team of one warp for each tile of columns.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back_columns(const Arguments<T> a, const Workers workers, const Sums<Acc<T>> sums,
                      bool aligned) {
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
    Element<T, Any> element;
    A xhat[N], ct[N];
    element.z = load<T, N>(a.z + row * a.width + offset, at, aligned);
    element.ct_y = load_ct<Any>(a, row * a.width + offset, at, aligned);
    element.normalised(a.mean[row], a.rstd[row], xhat);
    element.cotangent(a, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      d_scale[e] += ct[e] * xhat[e];
      d_bias[e] += ct[e];
    }
  }
  if (sums.d_scale) {
    add_teams(team, d_scale, shared);
#pragma unroll
    for (int e = 0; e < N; ++e) d_scale[e] *= a.scale_factor;
    if (team.index == 0) {
      store_sums(a, sums.d_scale + unit * sums.stride + offset, at, aligned, d_scale);
    }
  }
  if (sums.d_bias) {
    add_teams(team, d_bias, shared);
    if (team.index == 0) {
      store_sums(a, sums.d_bias + unit * sums.stride + offset, at, aligned, d_bias);
    }
  }
}

template <class T, class Y>
constexpr auto kernel_for(const RowPlan& plan, bool aligned) {
  return !aligned          ? pull_back<T, Y, kCotangentTuning.unaligned_packs, false>
         : plan.packs == 1 ? pull_back<T, Y, 1, true>
                           : pull_back<T, Y, 2, true>;
}

template <class T>
bool vector_access(const PhiResidualLayernormCotangent& call) {
  return call.rows.width % kVector<T> == 0 &&
         all_aligned(call.z, call.scale, call.ct_y, call.ct_z, call.d_identity, call.d_residual,
                     call.d_scale, call.d_bias, call.scratch);
}

// Launches `sum` on the workers that the scratch memory has room for, and folds what they leave.
// sum(workers, sums) launches one kernel in which every unit of work stores its column sums.
template <class T, class F>
Status gather(Stream stream, const PhiResidualLayernormCotangent& call, int teams, int64_t resident,
              F&& sum) {
  using A = Acc<T>;
  A* d_scale = static_cast<A*>(call.d_scale);
  A* d_bias = static_cast<A*>(call.d_bias);
  const int64_t width = call.rows.width;
  const int64_t columns = width * ((d_scale != nullptr) + (d_bias != nullptr));
  const Workers workers = plan_workers(call.partials, call.rows.total() / call.partials, teams,
                                       resident, columns, call.scratch_size);
  if (workers.members == 1 || columns == 0) return sum(workers, Sums<A>{d_scale, d_bias, width});
  A* scratch = static_cast<A*>(call.scratch);
  const Sums<A> sums = {d_scale ? scratch : nullptr,
                        d_bias ? scratch + (d_scale ? width : 0) : nullptr, columns};
  const Status status = sum(workers, sums);
  if (status != kSuccess) return status;
  return fold(stream, scratch, workers.partials, workers.members, width,
              FoldTargets<A>{d_scale, d_bias});
}

template <class T>
Status run_stream(Stream stream, const PhiResidualLayernormCotangent& call, const RowPlan& plan) {
  const Arguments<T> arguments(call, plan);
  const bool aligned = vector_access<T>(call);
  if (call.d_identity || call.d_residual) {
    const int cluster = cluster_size(plan);
    const Status status = launch(stream, call.rows.total() * cluster, plan.threads, cluster,
                                 pull_back_stream<T>, arguments, aligned);
    if (status != kSuccess) return status;
  }
  if (!call.d_scale && !call.d_bias) return kSuccess;
  const int64_t tiles = ceil_div(call.rows.width, kVector<T> * kWarp);
  const int64_t resident = ceil_div(resident_blocks(kMaxThreads, 1, pull_back_columns<T>), tiles);
  return gather<T>(stream, call, kMaxThreads / kWarp, resident,
                   [&](const Workers& workers, const Sums<Acc<T>>& sums) {
                     return launch(stream, tiles * workers.partials * workers.members, kMaxThreads,
                                   1, pull_back_columns<T>, arguments, workers, sums, aligned);
                   });
}

template <class T, class Y>
Status run(Stream stream, const PhiResidualLayernormCotangent& call, const RowPlan& plan) {
  // Without d_identity and d_residual there is nothing to reduce along a row.
  if (plan.packs == 0 || !(call.d_identity || call.d_residual)) {
    return run_stream<T>(stream, call, plan);
  }
  const auto kernel = kernel_for<T, Y>(plan, vector_access<T>(call));
  const int cluster = cluster_size(plan);
  const int64_t resident = resident_blocks(plan.threads, cluster, kernel) / cluster;
  return gather<T>(stream, call, teams_per_block(plan), resident,
                   [&](const Workers& workers, const Sums<Acc<T>>& sums) {
                     const int64_t units = workers.partials * workers.members;
                     return launch(stream, std::min(units, resident) * cluster, plan.threads,
                                   cluster, kernel, Arguments<T>(call, plan), workers, sums);
                   });
}

template <class T, class Y>
Status load_rows() {
  return load_kernels(pull_back<T, Y, 1, true>, pull_back<T, Y, 2, true>,
                      pull_back<T, Y, kCotangentTuning.unaligned_packs, false>);
}

}  // namespace

Status phi_residual_layernorm_cotangent(Stream stream, const PhiResidualLayernormCotangent& call) {
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
    const RowPlan plan = plan_rows(call.rows.width, kVector<T>, vector_access<T>(call),
                                   has_clusters(pull_back<T, T, 2, true>), kCotangentTuning);
    return call.y_dtype == call.dtype ? run<T, T>(stream, call, plan)
                                      : run<T, Any>(stream, call, plan);
  });
}

Status load_phi_residual_layernorm_cotangent(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    Status status = load_rows<T, T>();
    if (status == kSuccess) status = load_rows<T, Any>();
    if (status != kSuccess) return status;
    return load_kernels(pull_back_stream<T>, pull_back_columns<T>, fold_columns<Acc<T>>);
  });
}

}  // namespace syntonic
