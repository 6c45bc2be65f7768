#include "softmax.cuh"

namespace syntonic {

// syntonic_softmax_cotangent.cu
Status load_syntonic_softmax_cotangent(DType dtype);

namespace {

constexpr int kPlaneThreads = 256;
constexpr int kPlaneRows = 4;  // of a thread, under way at a time

template <class T>
struct Arguments {
  using A = Acc<T>;

  Arguments(const SyntonicSoftmax& call, int team)
      : logits(call.logits),
        y(static_cast<T*>(call.y)),
        max(static_cast<A*>(call.max)),
        log_sum(static_cast<A*>(call.log_sum)),
        rows(call.logits.shape.rows()),
        group_rows(call.logits.shape.outer * call.logits.shape.inner),
        width(static_cast<int>(call.logits.shape.width)),
        inner(call.logits.shape.inner),
        team(team),
        shifted(all_aligned(call.logits.x, call.logits.weights, call.y)),
        log(call.log) {}

  Logits<T> logits;
  T* y;
  A* max;
  A* log_sum;
  int64_t rows;
  int64_t group_rows;
  int width;
  int64_t inner;
  int team;
  bool shifted;
  bool log;

  __device__ int64_t group(int64_t row) const { return row < rows ? row / group_rows : 0; }
  __device__ A scale(int64_t group) const { return logits.weights ? logits.scale[group] : A(0); }
};

template <class T>
__device__ void store_statistics(const Arguments<T>& a, int64_t row, const MaxSum<Acc<T>>& total) {
  if (!a.max) return;
  a.max[row] = total.max;
  a.log_sum[row] = log(total.sum);
}

// y of the elements of a pack from z: the exponential of what `log_sum` and the maximum leave of
// it, or that itself.
template <class A, int N>
__device__ void finish(const MaxSum<A>& total, A log_sum, bool log, uint32_t present, A (&z)[N]) {
  const A share = total.share(total.max), base = MaxSum<A>::base(total.max);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const A y = log ? (z[e] - total.max) - log_sum : exp(z[e] - base) * share;
    z[e] = present >> e & 1 ? y : log ? -kInfinity<A> : A(0);
  }
}

// Rows of whole packs that fit, K packs a thread.
template <class T, int K>
__global__ void __launch_bounds__(kMaxThreads, K == 2 ? 2 : 1) softmax_rows(const Arguments<T> a) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = int64_t{blockIdx.x} / team.blocks * team.count + team.index;
  const RowAccess<N> access(true, false, row, a.rows, a.width);
  const int64_t group = a.group(row);
  const A scale = a.scale(group);

  A z[K][N];
  uint32_t present[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    present[k] =
        load_logits(a.logits, scale, access.start, group * a.width, access.at(k, team), true, z[k]);
  }
  const MaxSum<A> own = max_sum_of(z, present);
  if (!a.log) {
    const A base = MaxSum<A>::base(own.max);
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int e = 0; e < N; ++e) z[k][e] = exp(z[k][e] - base);
    }
  }
  const MaxSum<A> total = reduce.all(own);
  if (team.rank == 0 && row < a.rows) store_statistics(a, row, total);
  const A share = total.share(own.max), log_sum = log(total.sum);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const A y = a.log ? (z[k][e] - total.max) - log_sum : z[k][e] * share;
      z[k][e] = present[k] >> e & 1 ? y : a.log ? -kInfinity<A> : A(0);
    }
    store(a.y + access.start, access.at(k, team), true, pack<T>(z[k]));
  }
}

// Rows of any width: read twice, the second time from the L2 cache if it holds them.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) softmax_stream(const Arguments<T> a, bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = int64_t{blockIdx.x} / team.blocks * team.count + team.index;
  const RowAccess<N> access(aligned, a.shifted, row, a.rows, a.width);
  const int64_t group = a.group(row), parameters = group * a.width - access.begin;
  const A scale = a.scale(group);
  const int turns = access.turns(team);

  MaxSum<A> total;
  for (int turn = 0; turn < turns; turn += kStreamPacks) {
    A z[kStreamPacks][N];
    uint32_t present[kStreamPacks];
#pragma unroll
    for (int k = 0; k < kStreamPacks; ++k) {
      present[k] = load_logits(a.logits, scale, access.start, parameters, access.at(turn + k, team),
                               aligned, z[k]);
    }
    total = MaxSum<A>::merge(total, max_sum_of(z, present));
  }
  total = reduce.all(total);
  if (team.rank == 0 && row < a.rows) store_statistics(a, row, total);
  const A log_sum = log(total.sum);
#pragma unroll 2
  for (int turn = 0; turn < turns; ++turn) {
    const Span at = access.at(turn, team);
    A z[N];
    const uint32_t present = load_logits(a.logits, scale, access.start, parameters, at, aligned, z);
    finish(total, log_sum, a.log, present, z);
    store(a.y + access.start, at, aligned, pack<T>(z));
  }
}

// Along an inner axis: the lanes of a block lie side by side on the places of the inner axes, and
// share the width out among `count` of them. Read twice.
template <class T>
__global__ void __launch_bounds__(kPlaneThreads)
    softmax_planes(const Arguments<T> a, bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ A max[N][kPlaneThreads], sum[N][kPlaneThreads];
  const Team team(a.team);
  const int thread = static_cast<int>(threadIdx.x), tile = N * team.size;
  const int64_t tiles = (a.inner + tile - 1) / tile;
  const int64_t plane = blockIdx.x / tiles, first = blockIdx.x % tiles * tile;
  const int places = a.inner - first < tile ? static_cast<int>(a.inner - first) : tile;
  const Span at = span<N>(aligned, 0, team.size, team.rank, places);
  const int64_t start = plane * a.width * a.inner + first;
  const int64_t group = a.group(plane * a.inner);
  const A scale = a.scale(group);
  const auto read = [&](int w, A(&z)[N]) {
    const int64_t here = start + w * a.inner;
    const Span span = w < a.width ? at : Span{at.first, at.step, 0};
    const uint32_t present = present_in<N>(a.logits.mask, here, span, aligned);
    load_unbiased(a.logits, scale, here, span, aligned, z);
    const A bias = a.logits.bias && w < a.width ? a.logits.bias[group * a.width + w] : A(0);
#pragma unroll
    for (int e = 0; e < N; ++e) z[e] += bias;
    hide_absent(present, z);
    return present;
  };

  MaxSum<A> total[N];
  for (int w = team.index; w < a.width; w += kPlaneRows * team.count) {
    A z[kPlaneRows][N];
    uint32_t present[kPlaneRows];
#pragma unroll
    for (int r = 0; r < kPlaneRows; ++r) present[r] = read(w + r * team.count, z[r]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      A column[kPlaneRows][1];
      uint32_t counts[kPlaneRows];
#pragma unroll
      for (int r = 0; r < kPlaneRows; ++r) {
        column[r][0] = z[r][e];
        counts[r] = present[r] >> e & 1;
      }
      total[e] = MaxSum<A>::merge(total[e], max_sum_of(column, counts));
    }
  }
#pragma unroll
  for (int e = 0; e < N; ++e) max[e][thread] = total[e].max, sum[e][thread] = total[e].sum;
  __syncthreads();
  A log_sum[N];
#pragma unroll
  for (int e = 0; e < N; ++e) {
    total[e] = {};
    for (int other = team.rank; other < kPlaneThreads; other += team.size) {
      total[e] = MaxSum<A>::merge(total[e], {max[e][other], sum[e][other]});
    }
    log_sum[e] = log(total[e].sum);
    if (team.index == 0 && at.holds(e)) {
      store_statistics(a, plane * a.inner + first + at.first + e * at.step, total[e]);
    }
  }
#pragma unroll 2
  for (int w = team.index; w < a.width; w += team.count) {
    A z[N];
    const uint32_t present = read(w, z);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      A one[1] = {z[e]};
      finish(total[e], log_sum[e], a.log, present >> e & 1, one);
      z[e] = one[0];
    }
    store(a.y + start + w * a.inner, at, aligned, pack<T>(z));
  }
}

template <class T>
Status run_rows(Stream stream, const SyntonicSoftmax& call) {
  const Planes& shape = call.logits.shape;
  const bool aligned = whole_packs<T>(call.logits, shape.width, call.y);
  RowPlan plan = plan_stream<T>(shape.width);
  if constexpr (kHeld<T>) {
    if (aligned) {
      plan = plan_rows(shape.width, kVector<T>, true, softmax_rows<T, 4>, kForwardTuning);
    }
  }
  const Arguments<T> arguments(call, plan.team);
  const Grid grid = grid_of_rows(plan, shape.rows());
  if constexpr (kHeld<T>) {
    if (plan.packs == 2) return launch(stream, grid, softmax_rows<T, 2>, arguments);
    if (plan.packs == 4) return launch(stream, grid, softmax_rows<T, 4>, arguments);
    if (plan.packs == 8) return launch(stream, grid, softmax_rows<T, 8>, arguments);
  }
  return launch(stream, grid, softmax_stream<T>, arguments, aligned);
}

template <class T>
Status run_planes(Stream stream, const SyntonicSoftmax& call) {
  const Planes& shape = call.logits.shape;
  const bool aligned = whole_packs<T>(call.logits, shape.inner, call.y);
  int team = 1;
  while (team < kWarp && team * kVector<T> < shape.inner) team *= 2;
  const int64_t tiles = ceil_div(shape.inner, team * kVector<T>);
  return launch(stream, {shape.groups * shape.outer * tiles, kPlaneThreads}, softmax_planes<T>,
                Arguments<T>(call, team), aligned);
}

}  // namespace

Status syntonic_softmax(Stream stream, const SyntonicSoftmax& call) {
  if (call.logits.shape.elements() == 0) return kSuccess;
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return call.logits.shape.inner == 1 ? run_rows<T>(stream, call) : run_planes<T>(stream, call);
  });
}

Status load_syntonic_softmax(DType dtype) {
  const Status status = with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    Status status = load_kernels(softmax_stream<T>, softmax_planes<T>);
    if constexpr (kHeld<T>) {
      if (status == kSuccess) {
        status = load_kernels(softmax_rows<T, 2>, softmax_rows<T, 4>, softmax_rows<T, 8>);
      }
    }
    return status;
  });
  return status == kSuccess ? load_syntonic_softmax_cotangent(dtype) : status;
}

}  // namespace syntonic
