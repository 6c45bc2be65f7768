#include "phi_residual_layernorm.h"
#include "row.cuh"
#include "row_statistics.cuh"

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
        statistics(static_cast<RowStatistics<A>*>(call.statistics)),
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
  RowStatistics<A>* statistics;
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
template <class T, int N>
__device__ Packed<T, N> residual_sum(const Arguments<T>& a, const Packed<T, N>& identity,
                                     const Packed<T, N>& residual) {
  if (!a.residual) return identity;
  Acc<T> i[N], r[N];
  unpack(identity, i);
  unpack(residual, r);
#pragma unroll
  for (int e = 0; e < N; ++e) i[e] = a.sum_scale * (i[e] + a.residual_scale * r[e]);
  return pack<T>(i);
}

// Where the scale and bias of this row begin.
template <class T>
__device__ int64_t parameter_row(const Arguments<T>& a, int64_t row) {
  return a.group_rows == 0 || row >= a.rows ? 0 : row / a.group_rows * a.width;
}

// Of these elements; 1 without a scale.
template <class T, int N>
__device__ void load_scale(const Arguments<T>& a, int64_t parameters, const Span& at, bool vector,
                           Acc<T> (&scale)[N]) {
  if (a.scale) return load_parameter(a.scale + parameters, at, vector, scale);
#pragma unroll
  for (int e = 0; e < N; ++e) scale[e] = 1;
}

template <class T, int N>
__device__ void store_normalised(const Arguments<T>& a, int64_t start, int64_t parameters,
                                 const Span& at, bool vector, const Packed<T, N>& z,
                                 const Normaliser<T>& normal, const Acc<T> (&scale)[N]) {
  Acc<T> y[N], bias[N];
  unpack(z, y);
#pragma unroll
  for (int e = 0; e < N; ++e) y[e] = normal(y[e]);
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

// Whether a row is left to normalise_rescaled. No square of a float16 number leaves the range.
template <class T>
__device__ bool is_odd(const RowStatistics<Acc<T>>& found) {
  return !std::is_same_v<T, f16> && left_range(found);
}

// The rows among those of a warp's lanes that are `odd`, one after the other: by the whole warp,
// from memory, and as slow as may be, for such a row is rare.
template <class T>
__device__ void normalise_rescaled(const Arguments<T>& a, bool odd) {
  if constexpr (std::is_same_v<T, f16>) return;
  using A = Acc<T>;
  constexpr int N = kVector<T>, kStretch = N * kWarp;
  unsigned left = __ballot_sync(0xffffffffu, odd);
  if (left == 0) return;
  // Found again, so that no registers hold them until here.
  const Team team(again(a.team));
  const int64_t row = team.number();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  left &= __ballot_sync(0xffffffffu, row < a.rows && team.rank < kWarp);
  while (left != 0) {
    const int64_t next = __shfl_sync(0xffffffffu, row, __ffs(static_cast<int>(left)) - 1);
    left &= ~__ballot_sync(0xffffffffu, row == next);
    const int64_t start = next * a.width, parameters = parameter_row(a, next);
    const auto for_each_pack = [&](auto f) {
#pragma unroll 1
      for (int64_t offset = 0; offset < a.width; offset += kStretch) {
        const int64_t end = a.width - offset < kStretch ? a.width - offset : kStretch;
        const Span at = span<N>(false, 0, kWarp, lane, static_cast<int>(end));
        Packed<T, N> residual = {};
        if (a.residual) residual = load<T, N>(a.residual + start + offset, at, false);
        f(offset, at,
          residual_sum(a, load<T, N>(a.identity + start + offset, at, false), residual));
      }
    };
    const RowStatistics<A> found = rescaled_statistics<A>(a.width, a.epsilon, [&](auto f) {
      for_each_pack([&](int64_t, const Span& at, const Packed<T, N>& z) {
        A x[N];
        unpack(z, x);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (at.holds(e)) f(x[e]);
        }
      });
    });
    if (lane == 0 && a.statistics) a.statistics[next] = found;
    const Normaliser<T> normal(found, a.scale_factor);
    for_each_pack([&](int64_t offset, const Span& at, const Packed<T, N>& z) {
      A scale[N];
      load_scale(a, parameters + offset, at, false, scale);
      store_normalised(a, start + offset, parameters + offset, at, false, z, normal, scale);
    });
  }
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
  const RowStatistics<A> found = statistics_of(reduce.collect(), a.epsilon);
  const bool odd = is_odd<T>(found);
  if (kAligned && odd) end = 0;  // no element of it is stored
  if (team.rank == 0 && row < a.rows && !odd && a.statistics) a.statistics[row] = found;
  const Normaliser<T> normal(found, a.scale_factor);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (kAligned ? at(k).first >= at(k).end : odd) continue;
    if (k > 0 || !kAligned) load_scale(a, parameters, at(k), kAligned, scale);
    store_normalised(a, start, parameters, at(k), kAligned, z[k], normal, scale);
  }
  normalise_rescaled(a, kAligned ? end == 0 : odd);
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
  const RowStatistics<A> found = statistics_of(reduce.all(moments), a.epsilon);
  const bool odd = is_odd<T>(found);
  if (team.rank == 0 && !odd && a.statistics) a.statistics[row] = found;
  const Normaliser<T> normal(found, a.scale_factor);
  const int64_t parameters = parameter_row(a, row);
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    const RowPack<T> z = sum_at(offset, at);
    if (a.z) store(a.z + start + offset, at, aligned, z);
    if (odd) continue;
    A scale[N];
    load_scale(a, parameters + offset, at, aligned, scale);
    store_normalised(a, start + offset, parameters + offset, at, aligned, z, normal, scale);
  }
  normalise_rescaled(a, odd);
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
