#include "softmax_cotangent.cuh"

namespace syntonic {
namespace {

constexpr int kPlaneThreads = 256;
constexpr RowTuning kPullTuning = {{{8192, 2}, {0, 4}}, {}, 0};

// Along an inner axis, as softmax_planes.
template <Pull kPull, class T>
__global__ void __launch_bounds__(kPlaneThreads)
    pull_planes(const PullArguments<T> a, bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ A shared[N][kPlaneThreads];
  const Team team(a.team);
  const int thread = static_cast<int>(threadIdx.x), tile = N * team.size;
  const int64_t tiles = (a.inner + tile - 1) / tile;
  const int64_t plane = blockIdx.x / tiles, first = blockIdx.x % tiles * tile;
  const int places = a.inner - first < tile ? static_cast<int>(a.inner - first) : tile;
  const Span at = span<N>(aligned, 0, team.size, team.rank, places);
  const int64_t start = plane * a.width * a.inner + first;
  const int64_t rows = plane * a.inner + first;
  const int64_t group = a.group(plane * a.inner);
  const A scale = a.scale(group);
  PullRow<T> known[N];
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (kPull == Pull::softmax || !at.holds(e)) continue;
    known[e] = PullRow<T>::template of<kPull>(a, rows + at.first + e * at.step, group);
  }
  const auto read = [&](int w, A(&p)[N], A(&ct)[N]) {
    const int64_t here = start + w * a.inner;
    if constexpr (kPull == Pull::softmax) {
      return load_pull<kPull>(a, known[0], here, 0, at, aligned, p, ct);
    } else {
      const uint32_t present = present_in<N>(a.logits.mask, here, at, aligned);
      load_unbiased(a.logits, scale, here, at, aligned, p);
      unpack(load<T, N, Cache::keep>(a.ct + here, at, aligned), ct);
      const A bias = a.logits.bias ? a.logits.bias[group * a.width + w] : A(0);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        A one[1] = {p[e] + bias};
        to_probabilities(known[e], present >> e & 1, one);
        p[e] = one[0];
        ct[e] = present >> e & 1 ? ct[e] : A(0);
      }
      return present;
    }
  };

  A sum[N] = {};
#pragma unroll 4
  for (int w = team.index; w < a.width; w += team.count) {
    A p[N], ct[N];
    read(w, p, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] += row_term<kPull>(p[e], ct[e]);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) shared[e][thread] = sum[e];
  __syncthreads();
#pragma unroll
  for (int e = 0; e < N; ++e) {
    sum[e] = 0;
    for (int other = team.rank; other < kPlaneThreads; other += team.size) {
      sum[e] += shared[e][other];
    }
  }
#pragma unroll 2
  for (int w = team.index; w < a.width; w += team.count) {
    A p[N], ct[N];
    const uint32_t present = read(w, p, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      A one[1] = {p[e]};
      const A one_ct[1] = {ct[e]};
      pull<kPull>(sum[e], -1, Span{}, present >> e & 1, one_ct, one);
      p[e] = one[0];
    }
    store(a.d_z + start + w * a.inner, at, aligned, pack<T>(p));
  }
}

template <class T>
PullArguments<T> arguments_of(const SyntonicSoftmaxCotangent& call, int team) {
  using A = Acc<T>;
  const Planes& shape = call.logits.shape;
  return {.logits = Logits<T>(call.logits),
          .y = static_cast<const T*>(call.y),
          .max = static_cast<const A*>(call.max),
          .log_sum = static_cast<const A*>(call.log_sum),
          .ct = static_cast<const T*>(call.ct),
          .labels = nullptr,
          .row_ct = nullptr,
          .d_z = static_cast<T*>(call.d_z),
          .row_sums = nullptr,
          .rows = shape.rows(),
          .group_rows = shape.outer * shape.inner,
          .width = static_cast<int>(shape.width),
          .inner = shape.inner,
          .team = team,
          .shifted = all_aligned(call.logits.x, call.logits.weights, call.y, call.ct, call.d_z)};
}

template <Pull kPull, class T>
Status run_stream(Stream stream, const SyntonicSoftmaxCotangent& call, const RowPlan& plan,
                  bool aligned) {
  using A = Acc<T>;
  const int64_t rows = call.logits.shape.rows();
  A* scratch = static_cast<A*>(call.scratch);
  // s of every row is left at the front of the scratch memory for the sums of columns.
  const int64_t kept = call.d_bias ? ceil_div(rows, 4) * 4 : 0;
  if (kept > call.scratch_size) return cudaErrorInvalidValue;
  PullArguments<T> arguments = arguments_of<T>(call, plan.team);
  arguments.row_sums = call.d_bias ? scratch : nullptr;
  const Status status =
      launch(stream, grid_of_rows(plan, rows), pull_stream<kPull, T>, arguments, aligned);
  if (status != kSuccess || !call.d_bias) return status;
  return sum_columns<kPull>(stream, arguments, aligned, call.partials, static_cast<A*>(call.d_bias),
                            scratch + kept, call.scratch_size - kept);
}

template <Pull kPull, class T>
Status run_held(Stream stream, const SyntonicSoftmaxCotangent& call, const RowPlan& plan) {
  using A = Acc<T>;
  const Planes& shape = call.logits.shape;
  A* d_bias = static_cast<A*>(call.d_bias);
  Grid grid = grid_of_rows(plan, shape.rows());
  const auto kernel = plan.packs == 2 ? pull_rows<kPull, T, 2> : pull_rows<kPull, T, 4>;
  const int teams = teams_per_block(plan);
  const int64_t resident = resident_blocks(grid, kernel) / grid.cluster;
  // Without sums nothing is gained by few workers.
  const Workers workers = d_bias ? plan_workers(call.partials, shape.rows() / call.partials, teams,
                                                resident, shape.width, call.scratch_size)
                                 : Workers{1, shape.rows(), ceil_div(shape.rows(), teams)};
  return gather_columns(stream, workers, shape.width, FoldTargets<A>{d_bias, nullptr}, call.scratch,
                        [&](const FoldTargets<A>& sums, int64_t stride) {
                          const int64_t units = workers.partials * workers.members;
                          grid.blocks = (d_bias ? std::min(units, resident) : units) * grid.cluster;
                          return launch(stream, grid, kernel, arguments_of<T>(call, plan.team),
                                        workers, sums.first, stride);
                        });
}

template <Pull kPull, class T>
Status run_rows(Stream stream, const SyntonicSoftmaxCotangent& call) {
  const int64_t width = call.logits.shape.width;
  const bool aligned =
      whole_packs<T>(call.logits, width, call.y, call.ct, call.d_z, call.d_bias, call.scratch);
  RowPlan plan = plan_stream<T>(width);
  if constexpr (kHeld<T>) {
    if (aligned) plan = plan_rows(width, kVector<T>, true, pull_rows<kPull, T, 2>, kPullTuning);
    if (plan.packs != 0) return run_held<kPull, T>(stream, call, plan);
  }
  return run_stream<kPull, T>(stream, call, plan, aligned);
}

template <Pull kPull, class T>
Status run_planes(Stream stream, const SyntonicSoftmaxCotangent& call) {
  const Planes& shape = call.logits.shape;
  if (call.d_bias) return cudaErrorInvalidValue;
  const bool aligned = whole_packs<T>(call.logits, shape.inner, call.y, call.ct, call.d_z);
  int team = 1;
  while (team < kWarp && team * kVector<T> < shape.inner) team *= 2;
  const int64_t tiles = ceil_div(shape.inner, team * kVector<T>);
  return launch(stream, {shape.groups * shape.outer * tiles, kPlaneThreads}, pull_planes<kPull, T>,
                arguments_of<T>(call, team), aligned);
}

template <Pull kPull, class T>
Status load_kernels_of() {
  Status status = load_kernels(pull_stream<kPull, T>, pull_columns<kPull, T>, pull_planes<kPull, T>,
                               fold_columns<Acc<T>>);
  if constexpr (kHeld<T>) {
    if (status == kSuccess) status = load_kernels(pull_rows<kPull, T, 2>, pull_rows<kPull, T, 4>);
  }
  return status;
}

}  // namespace

Status syntonic_softmax_cotangent(Stream stream, const SyntonicSoftmaxCotangent& call) {
  const Planes& shape = call.logits.shape;
  if (shape.elements() == 0) {
    const size_t bytes = call.partials * shape.width * item_size(accumulation(call.logits.dtype));
    return call.d_bias && bytes ? cudaMemsetAsync(call.d_bias, 0, bytes, stream) : kSuccess;
  }
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto pull) {
      constexpr Pull kPull = decltype(pull)::value;
      return shape.inner == 1 ? run_rows<kPull, T>(stream, call)
                              : run_planes<kPull, T>(stream, call);
    };
    if (call.y) return run(std::integral_constant<Pull, Pull::softmax>{});
    return run(std::integral_constant<Pull, Pull::log_softmax>{});
  });
}

Status load_syntonic_softmax_cotangent(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    const Status status = load_kernels_of<Pull::softmax, T>();
    return status == kSuccess ? load_kernels_of<Pull::log_softmax, T>() : status;
  });
}

}  // namespace syntonic
