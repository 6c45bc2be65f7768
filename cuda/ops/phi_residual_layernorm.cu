#include "core/golden.cuh"
#include "engine/row_plan.cuh"
#include "ops/phi_residual_layernorm.h"
#include "ops/row_statistics.cuh"

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
  golden_sum(i, r, a.sum_scale, a.residual_scale);
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

// Whether squares of numbers of this type can leave the range of their accumulation type.
template <class T>
constexpr bool kMayLeaveRange = !std::is_same_v<T, f16>;

// One number of z.
template <class T>
__device__ Acc<T> residual_sum(const Arguments<T>& a, int64_t i) {
  Acc<T> z[1] = {static_cast<Acc<T>>(a.identity[i])};
  if (!a.residual) return z[0];
  const Acc<T> residual[1] = {static_cast<Acc<T>>(a.residual[i])};
  golden_sum(z, residual, a.sum_scale, a.residual_scale);
  return static_cast<Acc<T>>(narrow<T>(z[0]));
}

// The statistics of a row of any range, by one warp, number by number from memory.
template <class T>
__device__ RowStatistics<Acc<T>> statistics_again(const Arguments<T>& a, int64_t row) {
  const int64_t start = row * a.width;
  return rescaled_statistics<Acc<T>>(a.width, a.epsilon, [&](auto f) {
#pragma unroll 1
    for (int64_t j = threadIdx.x % kWarp; j < a.width; j += kWarp) f(residual_sum(a, start + j));
  });
}

// Where a row lies that is held in registers. Narrow rows are mostly edges: they are not shifted.
template <class T, int K, bool kAligned>
struct Place {
  static constexpr int N = kVector<T>;
  static constexpr bool kShifted = !kAligned && K > 2;
  int64_t start;
  int begin = 0;
  int end;  // an idle team: an empty row
  int limit = -1;

  __device__ Place(const Arguments<T>& a, int64_t row)
      : start(row * a.width), end(row < a.rows ? static_cast<int>(a.width) : 0) {
    if (!kShifted || !a.shifted || end == 0) return;
    begin = static_cast<int>(start % N);
    start -= begin;
    end += begin;
    const int64_t rest = a.rows * a.width - start;
    limit = rest < end + N ? static_cast<int>(rest) : end + N;
  }

  // Of the packs that a thread takes, number k.
  __device__ Span at(int k, const Team& team) const {
    if (kShifted) return Span{(k * team.size + team.rank) * N, 1, end, begin, limit};
    return span<N>(kAligned, k, team.size, team.rank, end);
  }
};

// Writes the rows of a warp again whose squares have left the range, among which this thread's is
// if it is `odd`. Each thread overwrites what it wrote. Such a row is rare: this takes what time it
// takes, but no registers from the others. So it finds out again where the thread is.
template <class T, int K, bool kAligned>
__device__ void normalise_again(const Arguments<T>& a, bool odd) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  const Team team(again(a.team));
  const int64_t row = team.number();
  RowStatistics<A> found;
  for (unsigned left = __ballot_sync(0xffffffffu, odd); left != 0;) {
    const int64_t next = __shfl_sync(0xffffffffu, row, __ffs(static_cast<int>(left)) - 1);
    left &= ~__ballot_sync(0xffffffffu, row == next);
    if (next >= a.rows) continue;
    const RowStatistics<A> of_next = statistics_again(a, next);
    if (row == next) found = of_next;
  }
  if (!odd || row >= a.rows) return;
  if (team.rank == 0 && a.statistics) a.statistics[row] = found;
  const Normaliser<T> normal(found, a.scale_factor);
  const Place<T, K, kAligned> place(a, row);
  const int64_t parameters = parameter_row(a, row) - place.begin;
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    const Span at = place.at(k, team);
    const RowPack<T> identity = load<T, N>(a.identity + place.start, at, kAligned);
    RowPack<T> residual = {};
    if (a.residual) residual = load<T, N>(a.residual + place.start, at, kAligned);
    A scale[N];
    load_scale(a, parameters, at, kAligned, scale);
    store_normalised(a, place.start, parameters, at, kAligned, residual_sum(a, identity, residual),
                     normal, scale);
  }
}

// How many blocks a multiprocessor should have registers for.
template <class T, int K>
constexpr int kBlocksAtOnce = sizeof(T) == 8 || K == 8 ? 1 : 2;

// Rows that fit: K packs a thread.
template <class T, int K, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce<T, K>)
    normalise(const Arguments<T> a) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Moments<A>, kMaxCluster> shared;
  const Team team(a.team);
  Reducer<Moments<A>, kMaxCluster> reduce(shared, team);
  const int64_t row = team.number();
  Place<T, K, kAligned> place(a, row);
  const int64_t start = place.start;
  const auto at = [&](int k) { return place.at(k, team); };

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
  // what keeps more rows from being on their way.
  const int64_t parameters = parameter_row(a, row) - place.begin;
  const RowStatistics<A> found = statistics_of(reduce.collect(), a.epsilon);
  const Normaliser<T> normal(found, a.scale_factor);
  // Registers are scarce here: each way takes fewer of them in its kernels.
  if (kAligned && kMayLeaveRange<T> && left_range(found.slope, A(4))) place.end = 0;
  if (team.rank == 0 && place.end > place.begin && a.statistics) a.statistics[row] = found;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (kAligned && at(k).first >= at(k).end) continue;
    A scale[N];
    load_scale(a, parameters, at(k), kAligned, scale);
    store_normalised(a, start, parameters, at(k), kAligned, z[k], normal, scale);
  }
  if constexpr (kMayLeaveRange<T>) {
    const bool odd = kAligned ? place.end == 0 : left_range(normal.slope(), a.scale_factor);
    if (__ballot_sync(0xffffffffu, odd) != 0) normalise_again<T, K, kAligned>(a, odd);
  }
}

// Rows of any width: read twice, the second time from the L2 cache if it holds them.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2)
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
  RowStatistics<A> found = statistics_of(reduce.all(moments), a.epsilon);
  if (kMayLeaveRange<T> && left_range(found.slope, A(4))) found = statistics_again(a, row);
  if (team.rank == 0 && a.statistics) a.statistics[row] = found;
  const Normaliser<T> normal(found, a.scale_factor);
  const int64_t parameters = parameter_row(a, row);
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    const RowPack<T> z = sum_at(offset, at);
    if (a.z) store(a.z + start + offset, at, aligned, z);
    A scale[N];
    load_scale(a, parameters + offset, at, aligned, scale);
    store_normalised(a, start + offset, parameters + offset, at, aligned, z, normal, scale);
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
const RowTuning& tuning(const PhiResidualLayernorm& call) {
  if (!vector_access<T>(call)) return kForwardUnaligned;
  if (call.residual) return kForward;
  return sizeof(T) == 2 ? kPlainForward16 : kPlainForward;
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
    const RowPlan plan =
        plan_rows(call.rows.width, kVector<T>, normalise<T, 4, true>, tuning<T>(call));
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
