#include "golden.cuh"
#include "phi_residual_layernorm.h"
#include "row.cuh"

namespace syntonic {

// phi_residual_layernorm_cotangent.cu
Status load_phi_residual_layernorm_cotangent(DType dtype);

namespace {

template <class T>
struct Arguments {
  using A = Acc<T>;

  Arguments(const PhiResidualLayernorm& call, const RowPlan& plan)
      : identity(static_cast<const T*>(call.identity)),
        residual(static_cast<const T*>(call.residual)),
        scale(static_cast<const A*>(call.scale)),
        bias(static_cast<const A*>(call.bias)),
        y{call.y, call.y_dtype},
        z(static_cast<T*>(call.z)),
        mean(static_cast<A*>(call.mean)),
        rstd(static_cast<A*>(call.rstd)),
        rows(call.rows.total()),
        group_rows(call.rows.groups == 1 ? 0 : call.rows.count),
        width(call.rows.width),
        shifted(all_aligned(call.identity, call.residual, call.y, call.z)),
        team(plan.team),
        sum_scale(static_cast<A>(call.sum_scale)),
        residual_scale(static_cast<A>(call.residual_scale)),
        epsilon(static_cast<A>(call.epsilon)),
        scale_factor(static_cast<A>(call.scale_factor)) {}

  const T* identity;
  const T* residual;
  const A* scale;
  const A* bias;
  AnyArray y;
  T* z;
  A* mean;
  A* rstd;
  int64_t rows;
  int64_t group_rows;  // 0: one group, no division needed
  int64_t width;
  bool shifted;  // whether rows of other than whole packs may be moved by packs
  int team;
  A sum_scale;
  A residual_scale;
  A epsilon;
  A scale_factor;
};

template <class T>
using RowPack = Packed<T, kVector<T>>;

// The residual sum, rounded to T: statistics and y are those of the rounded sum. Without a residual
// the sum is identity.
template <class T>
__device__ RowPack<T> residual_sum(const Arguments<T>& a, const RowPack<T>& identity,
                                   const RowPack<T>& residual) {
  if (!a.residual) return identity;
  Acc<T> i[kVector<T>], r[kVector<T>];
  unpack(identity, i);
  unpack(residual, r);
  golden_sum(i, r, a.sum_scale, a.residual_scale);
  return pack<T>(i);
}

template <class T>
__device__ Acc<T> reciprocal_deviation(const Arguments<T>& a, const Moments<Acc<T>>& moments) {
  return Acc<T>(1) / sqrt(moments.variance() + a.epsilon);
}

template <class T>
__device__ void store_statistics(const Arguments<T>& a, const Team& team, int64_t row, Acc<T> mean,
                                 Acc<T> rstd) {
  if (team.rank != 0 || row >= a.rows) return;
  if (a.mean) a.mean[row] = mean;
  if (a.rstd) a.rstd[row] = rstd;
}

// Where the scale and bias of this row begin.
template <class T>
__device__ int64_t parameter_row(const Arguments<T>& a, int64_t row) {
  return a.group_rows == 0 || row >= a.rows ? 0 : row / a.group_rows * a.width;
}

// Of these elements; 1 without a scale.
template <class T>
__device__ void load_scale(const Arguments<T>& a, int64_t parameters, const Span& at, bool vector,
                           Acc<T> (&scale)[kVector<T>]) {
  if (a.scale) return load_parameter(a.scale + parameters, at, vector, scale);
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) scale[e] = 1;
}

// `slope` is scale_factor * rstd.
template <class T>
__device__ void store_normalised(const Arguments<T>& a, int64_t start, int64_t parameters,
                                 const Span& at, bool vector, const RowPack<T>& z, Acc<T> mean,
                                 Acc<T> slope, const Acc<T> (&scale)[kVector<T>]) {
  constexpr int N = kVector<T>;
  Acc<T> y[N], bias[N];
  unpack(z, y);
#pragma unroll
  for (int e = 0; e < N; ++e) y[e] = (y[e] - mean) * slope;
  if (a.bias) {
    load_parameter(a.bias + parameters, at, vector, bias);
#pragma unroll
    for (int e = 0; e < N; ++e) y[e] = y[e] * scale[e] + bias[e];
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) y[e] *= scale[e];
  }
  store_any<T>(a.y, start, at, vector, y);
}

constexpr int most_threads(bool aligned) {
  return aligned ? kMaxThreads : kForwardTuning.unaligned_threads;
}

// How many blocks a multiprocessor should have registers for.
template <class T, int K>
constexpr int blocks_at_once(bool aligned) {
  return sizeof(T) == 8 || K == 8 ? 1 : aligned ? 2 : 3;
}

// Rows that fit: K packs a thread.
template <class T, int K, bool kAligned>
__global__ void __launch_bounds__(most_threads(kAligned), blocks_at_once<T, K>(kAligned))
    normalise(const Arguments<T> a) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  constexpr bool kShifted = !kAligned && K > 2;  // narrow rows are mostly edges
  __shared__ Exchange<Moments<A>, kMaxCluster> shared;
  const Team team(a.team);
  Reducer<Moments<A>, kMaxCluster> reduce(shared, team);
  const int64_t row = team.number();
  int64_t start = row * a.width;
  int begin = 0, end = row < a.rows ? static_cast<int>(a.width) : 0;  // an idle team: an empty row
  int limit = -1;
  if (kShifted && a.shifted && end > 0) {
    begin = static_cast<int>(start % N);
    start -= begin;
    end += begin;
    const int64_t rest = a.rows * a.width - start;
    limit = rest < end + N ? static_cast<int>(rest) : end + N;
  }
  const auto at = [&](int k) {
    if (kShifted) return Span{(k * team.size + team.rank) * N, 1, end, begin, limit};
    return span<N>(kAligned, k, team.size, team.rank, end);
  };

  // The widest rows have parameters that the L1 cache holds only if nothing else goes through it.
  constexpr Cache kCache = K == 8 ? Cache::once : Cache::keep;
  RowPack<T> z[K], residual[K];
#pragma unroll
  for (int k = 0; k < K; ++k) z[k] = load<T, N, kCache>(a.identity + start, at(k), kAligned);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    residual[k] = {};
    if (a.residual) residual[k] = load<T, N, kCache>(a.residual + start, at(k), kAligned);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    z[k] = residual_sum(a, z[k], residual[k]);
    if (a.z) store(a.z + start, at(k), kAligned, z[k]);
  }
  const auto valid = [&](int k, int e) { return at(k).holds(kAligned ? 0 : e); };
  reduce.post(moments_of(z, valid));
  // Parameters are loaded one after the other, and no sooner than they are needed: registers are
  // what keeps more rows from being on their way. Only the first need not be waited for.
  const int64_t parameters = parameter_row(a, row) - begin;
  A scale[N];
  if (kAligned) load_scale(a, parameters, at(0), true, scale);
  const Moments<A> moments = reduce.collect();
  const A mean = moments.mean(), rstd = reciprocal_deviation(a, moments);
  store_statistics(a, team, row, mean, rstd);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (kAligned && at(k).first >= at(k).end) continue;
    if (k > 0 || !kAligned) load_scale(a, parameters, at(k), kAligned, scale);
    store_normalised(a, start, parameters, at(k), kAligned, z[k], mean, rstd * a.scale_factor,
                     scale);
  }
}

// Rows of any width: read twice, the second time from the L2 cache if it holds them.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    normalise_stream(const Arguments<T> a, bool aligned) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Moments<A>, kMaxCluster> shared;
  const Team team(a.team);
  Reducer<Moments<A>, kMaxCluster> reduce(shared, team);
  const int64_t row = team.number();
  const int64_t start = row * a.width;
  const int stretch = N * team.size;
  // Of the stretch of the row from `offset` on.
  const auto span_at = [&](int64_t offset) {
    const int64_t end = a.width - offset < stretch ? a.width - offset : stretch;
    return span<N>(aligned, 0, team.size, team.rank, static_cast<int>(end));
  };
  const auto sum_at = [&](int64_t offset, const Span& at) {
    RowPack<T> residual = {};
    if (a.residual) residual = load<T, N>(a.residual + start + offset, at, aligned);
    return residual_sum(a, load<T, N>(a.identity + start + offset, at, aligned), residual);
  };

  Moments<A> moments;
#pragma unroll 4
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    RowPack<T> z[1] = {sum_at(offset, at)};
    const auto valid = [&](int, int e) { return at.holds(e); };
    moments = Moments<A>::merge(moments, moments_of(z, valid));
  }
  moments = reduce.all(moments);
  const A mean = moments.mean(), rstd = reciprocal_deviation(a, moments);
  store_statistics(a, team, row, mean, rstd);
  const int64_t parameters = parameter_row(a, row);
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    const RowPack<T> z = sum_at(offset, at);
    if (a.z) store(a.z + start + offset, at, aligned, z);
    A scale[N];
    load_scale(a, parameters + offset, at, aligned, scale);
    store_normalised(a, start + offset, parameters + offset, at, aligned, z, mean,
                     rstd * a.scale_factor, scale);
  }
}

template <class T>
constexpr auto kernel_for(const RowPlan& plan, bool aligned) {
  if (!aligned) return plan.packs == 2 ? normalise<T, 2, false> : normalise<T, 4, false>;
  return plan.packs == 2   ? normalise<T, 2, true>
         : plan.packs == 4 ? normalise<T, 4, true>
                           : normalise<T, 8, true>;
}

template <class T>
bool vector_access(const PhiResidualLayernorm& call) {
  return call.rows.width % kVector<T> == 0 &&
         all_aligned(call.identity, call.residual, call.scale, call.bias, call.y, call.z);
}

template <class T>
Status run(Stream stream, const PhiResidualLayernorm& call, const RowPlan& plan) {
  const Arguments<T> arguments(call, plan);
  const bool aligned = vector_access<T>(call);
  const int cluster = cluster_size(plan);
  const int64_t blocks = ceil_div(call.rows.total(), teams_per_block(plan)) * cluster;
  const Grid grid = {blocks, plan.threads, cluster};
  if (plan.packs == 0) return launch(stream, grid, normalise_stream<T>, arguments, aligned);
  return launch(stream, grid, kernel_for<T>(plan, aligned), arguments);
}

}  // namespace

Status phi_residual_layernorm(Stream stream, const PhiResidualLayernorm& call) {
  if (call.rows.elements() == 0) return kSuccess;
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const RowPlan plan = plan_rows(call.rows.width, kVector<T>, vector_access<T>(call),
                                   normalise<T, 4, true>, kForwardTuning);
    return run<T>(stream, call, plan);
  });
}

Status load_phi_residual_layernorm(DType dtype) {
  const Status status = with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    return load_kernels(normalise<T, 2, true>, normalise<T, 4, true>, normalise<T, 8, true>,
                        normalise<T, 2, false>, normalise<T, 4, false>, normalise_stream<T>);
  });
  return status == kSuccess ? load_phi_residual_layernorm_cotangent(dtype) : status;
}

}  // namespace syntonic
