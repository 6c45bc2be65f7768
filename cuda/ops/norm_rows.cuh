// The forward pass of a norm over rows, with or without a residual sum before it.
#pragma once

#include "ops/norm_pack.cuh"

namespace syntonic {
namespace norm {

// Writes the rows of a warp again whose squares have left the range, among which this thread's is
// if it is `odd`. Each thread overwrites what it wrote. It takes no registers from the other rows:
// it finds out again where the thread is.
template <class Norm, int K, bool kAligned>
__device__ void normalise_again(const Arguments<Norm>& a, bool odd) {
  using T = typename Norm::T;
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  const Team team(again(a.team));
  const int64_t row = team.number();
  const typename Norm::Statistics found = settled(a, odd, row, {});
  if (!odd || row >= a.rows) return;
  if (team.rank == 0 && a.statistics) a.statistics[row] = found;
  const typename Norm::Normal normal(found, a.scale_factor);
  const int64_t start = row * a.width, parameters = parameter_row(a, row);
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    const Span at = span<N>(kAligned, k, team.size, team.rank, static_cast<int>(a.width));
    const RowPack<T> identity = load<T, N>(a.identity + start, at, kAligned);
    RowPack<T> residual = {};
    if (a.residual) residual = load<T, N>(a.residual + start, at, kAligned);
    A scale[N], bias[N];
    load_scale(a, parameters, at, kAligned, scale);
    load_bias(a, parameters, at, kAligned, bias);
    store_normalised(a, start, at, kAligned, residual_sum(a, identity, residual), normal, scale,
                     bias);
  }
}

// How many blocks a multiprocessor should have registers for.
template <class T, int K>
constexpr int kBlocksAtOnce = sizeof(T) == 8 || K == 8 ? 1 : 2;

// Rows that fit: K packs a thread.
template <class Norm, int K, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce<typename Norm::T, K>)
    normalise(const Arguments<Norm> a) {
  wait_for_launches();
  using T = typename Norm::T;
  using A = Acc<T>;
  using Measure = typename Norm::Measure;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Measure, kMaxCluster> shared;
  const Team team(a.team);
  Reducer<Measure, kMaxCluster> reduce(shared, team);
  const int64_t row = team.number();
  const int64_t start = row * a.width;
  int end = row < a.rows ? static_cast<int>(a.width) : 0;  // an idle team: an empty row
  const auto at = [&](int k) { return span<N>(kAligned, k, team.size, team.rank, end); };

  RowPack<T> z[K], residual[K];
#pragma unroll
  for (int k = 0; k < K; ++k) z[k] = load<T, N, Cache::keep>(a.identity + start, at(k), kAligned);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    residual[k] = {};
    if (a.residual) residual[k] = load<T, N, Cache::keep>(a.residual + start, at(k), kAligned);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    z[k] = residual_sum(a, z[k], residual[k]);
    if (a.z) store(a.z + start, at(k), kAligned, z[k]);
  }
  reduce.post(Norm::measure(z, [&](int k) { return at(k).template present<N>(kAligned); }));
  // Parameters are loaded one after the other, and no sooner than they are needed: registers are
  // what keeps more rows from being on their way.
  const int64_t parameters = parameter_row(a, row);
  const typename Norm::Statistics found = Norm::statistics(reduce.collect(), a.width, a.epsilon);
  const typename Norm::Normal normal(found, a.scale_factor);
  // Registers are scarce here: each way takes fewer of them in its kernels.
  if (kAligned && kMayLeaveRange<T> && left_range(found.slope, A(4))) end = 0;
  if (team.rank == 0 && end > 0 && a.statistics) a.statistics[row] = found;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (kAligned && at(k).first >= at(k).end) continue;
    A scale[N], bias[N];
    load_scale(a, parameters, at(k), kAligned, scale);
    load_bias(a, parameters, at(k), kAligned, bias);
    store_normalised(a, start, at(k), kAligned, z[k], normal, scale, bias);
  }
  if constexpr (kMayLeaveRange<T>) {
    const bool odd = kAligned ? end == 0 : left_range(normal.slope(), a.scale_factor);
    if (__ballot_sync(0xffffffffu, odd) != 0) normalise_again<Norm, K, kAligned>(a, odd);
  }
}

// Rows on a persistent grid, K packs a thread: scale and bias are held for all of them.
template <class Norm, int K, bool kWhole_>
struct Normalise {
  using T = typename Norm::T;
  using A = Acc<T>;
  using Arguments = norm::Arguments<Norm>;
  using Sums = NoSums;
  using Known = NothingKnown;
  using Row = NothingKnown;
  using Measure = typename Norm::Measure;
  static constexpr int N = kVector<T>;
  static constexpr int kPacks = K;
  static constexpr int kRows = 1;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kThreads = kMaxThreads;
  static constexpr int kBlocks = 1;

  const Arguments& a;
  RowPacks<T, K, kWhole> packs;
  HeldParameter<A, N, K> scale;
  HeldParameter<A, N, Norm::kBias ? K : 0> bias;

  __device__ Normalise(const Arguments& a, const Team& team, int64_t row, int64_t partial)
      : a(a),
        packs(team, static_cast<int>(a.width), row),
        scale(a.scale, partial * a.width, A(1), packs),
        bias(a.bias, partial * a.width, A(0), packs) {}

  __device__ Known known(int64_t) const { return {}; }

  __device__ void fetch(const Slot& slot, int64_t row, bool exists) const {
    const int64_t start = exists ? packs.start(row) : 0;
    const auto how = packs.how(row, a.rows);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const auto at = packs.at(k, exists);
      stage<T, N>(slot.pack(k), slot.stride, a.identity + start, at, how);
      if (!a.residual) continue;
      stage<T, N>(slot.pack(k) + slot.stride, slot.stride, a.residual + start, at, how);
    }
  }

  // The residual sum takes the place of its first term.
  __device__ Measure measure(const Slot& slot, const Row&, int64_t row, bool exists) const {
    RowPack<T> z[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      z[k] = staged<T, N>(slot.pack(k), slot.stride);
      if (!a.residual) continue;
      z[k] = residual_sum(a, z[k], staged<T, N>(slot.pack(k) + slot.stride, slot.stride));
      put_back(slot.pack(k), z[k]);
      if (a.z) store<Cache::once>(a.z + packs.start(row), packs.at(k, exists), kWhole, z[k]);
    }
    return Norm::measure(z, [&](int k) { return exists ? packs.present(k) : 0; });
  }

  __device__ void finish(const Slot& slot, const Row&, int64_t row, bool exists,
                         const Measure& measured) const {
    typename Norm::Statistics found = Norm::statistics(measured, a.width, a.epsilon);
    if constexpr (kMayLeaveRange<T>) {
      const bool odd = exists && left_range(found.slope, A(4));
      if (__ballot_sync(0xffffffffu, odd) != 0) found = settled(a, odd, row, found);
    }
    if (packs.team.rank == 0 && exists && a.statistics) a.statistics[row] = found;
    const typename Norm::Normal normal(found, a.scale_factor);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A factor[N], shift[N];
      scale.read(k, factor);
      if constexpr (Norm::kBias) bias.read(k, shift);
      store_normalised<Cache::once>(a, packs.start(row), packs.at(k, exists), kWhole,
                                    staged<T, N>(slot.pack(k), slot.stride), normal, factor, shift);
    }
  }

  __device__ void leave(const Sums&, int64_t, uint4*) const {}
};

// Rows of any width: read twice, the second time from the L2 cache if it holds them.
template <class Norm, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 2) normalise_stream(const Arguments<Norm> a) {
  wait_for_launches();
  using T = typename Norm::T;
  using A = Acc<T>;
  using Measure = typename Norm::Measure;
  constexpr int N = kVector<T>;
  __shared__ Exchange<Measure, kMaxCluster> shared;
  const Team team(a.team);
  Reducer<Measure, kMaxCluster> reduce(shared, team);
  const int64_t row = team.number();
  const int64_t start = row * a.width;
  const int stretch = N * team.size;
  // Of the stretch of the row from `offset` on.
  const auto span_at = [&](int64_t offset) {
    const int64_t end = a.width - offset < stretch ? a.width - offset : stretch;
    return span<N>(kAligned, 0, team.size, team.rank, static_cast<int>(end));
  };
  const auto sum_at = [&](int64_t offset, const Span& at) {
    RowPack<T> residual = {};
    if (a.residual) residual = load<T, N>(a.residual + start + offset, at, kAligned);
    return residual_sum(a, load<T, N>(a.identity + start + offset, at, kAligned), residual);
  };

  Measure measured;
#pragma unroll 4
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    RowPack<T> z[1] = {sum_at(offset, at)};
    const auto present = [&](int) { return at.template present<N>(kAligned); };
    measured = Measure::merge(measured, Norm::measure(z, present));
  }
  typename Norm::Statistics found = Norm::statistics(reduce.all(measured), a.width, a.epsilon);
  if (kMayLeaveRange<T> && left_range(found.slope, A(4))) found = statistics_again(a, row);
  if (team.rank == 0 && a.statistics) a.statistics[row] = found;
  const typename Norm::Normal normal(found, a.scale_factor);
  const int64_t parameters = parameter_row(a, row);
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    const RowPack<T> z = sum_at(offset, at);
    if (a.z) store(a.z + start + offset, at, kAligned, z);
    A scale[N], bias[N];
    load_scale(a, parameters + offset, at, kAligned, scale);
    load_bias(a, parameters + offset, at, kAligned, bias);
    store_normalised(a, start + offset, at, kAligned, z, normal, scale, bias);
  }
}

template <class Norm, int K, bool kWhole>
constexpr auto normalise_ring = rows_in_ring<Normalise<Norm, K, kWhole>, false>;

template <class Norm>
constexpr auto ring_for(int packs, bool whole) {
  if (whole) return normalise_ring<Norm, 4, true>;
  if constexpr (Norm::kTuned && sizeof(typename Norm::T) == 2) {  // only their table asks for it
    if (packs == 2) return normalise_ring<Norm, 2, false>;
  }
  return normalise_ring<Norm, 4, false>;
}

template <class Norm>
constexpr auto kernel_for(int packs, bool whole) {
  if (!whole) return normalise<Norm, 2, false>;
  if constexpr (Norm::kTuned &&
                sizeof(typename Norm::T) > 2) {  // what the tables for 16 bits do not ask for
    if (packs == 8) return normalise<Norm, 8, true>;
  }
  return packs == 2 ? normalise<Norm, 2, true> : normalise<Norm, 4, true>;
}

template <class T>
bool vector_access(const NormRows& call) {
  return call.rows.width % kVector<T> == 0 &&
         all_aligned(call.identity, call.residual, call.scale, call.bias, call.y, call.z);
}

template <class Norm>
const RowTuning& tuning(const NormRows& call) {
  using T = typename Norm::T;
  const bool whole = vector_access<T>(call);
  if (!whole && !all_aligned(call.identity, call.residual, call.y, call.z)) {
    return kForwardUnaligned;
  }
  if (!Norm::kTuned) return whole ? kUntunedForward : kUntunedForwardRagged;
  if (!whole) {
    return sizeof(T) == 2 ? kForwardRagged16 : kForwardRagged;
  }
  if (call.residual) return kForward;
  return sizeof(T) == 2 ? kPlainForward16 : kPlainForward;
}

// Rows that the ring takes: wide ones, and those that are no whole packs.
template <class Norm>
Status run_ring(Stream stream, const NormRows& call, RowPlan& plan, bool& done) {
  using T = typename Norm::T;
  const Arguments<Norm> arguments(call, plan);
  const bool whole = vector_access<T>(call);
  const auto kernel = ring_for<Norm>(plan.packs, whole);
  const int teams = teams_per_block(plan);
  const size_t ring =
      fit_ring(plan, kernel, plan.rows, arguments.pieces, call.rows.width * sizeof(T));
  Grid grid = {0, plan.threads, cluster_size(plan), ring};
  const int64_t resident = resident_blocks(grid, kernel) / grid.cluster;
  const Workers workers = plan_workers(call.rows.groups, call.rows.count, teams, resident, 0, 0,
                                       whole ? 1 : phases(call.rows.width, kVector<T>));
  done = ring > 0 && fits_device(grid, kernel);
  if (!done) return kSuccess;
  const int64_t units = workers.partials * workers.members;
  grid.blocks = std::min(units, resident) * grid.cluster;
  return launch(stream, grid, kernel, arguments, workers, NoSums{}, plan.stages);
}

template <class Norm>
Status run(Stream stream, const NormRows& call, RowPlan plan) {
  using T = typename Norm::T;
  const bool whole = vector_access<T>(call);
  if (plan.stages > 0) {
    bool done = false;
    const Status status = run_ring<Norm>(stream, call, plan, done);
    if (done) return status;
    plan = {0, kMaxThreads, kMaxThreads};
  }
  const Arguments<Norm> arguments(call, plan);
  const int cluster = cluster_size(plan);
  const int64_t blocks = ceil_div(call.rows.total(), teams_per_block(plan)) * cluster;
  const Grid grid = {blocks, plan.threads, cluster};
  if (plan.packs == 0) {
    const auto kernel = whole ? normalise_stream<Norm, true> : normalise_stream<Norm, false>;
    return launch(stream, grid, kernel, arguments);
  }
  return launch(stream, grid, kernel_for<Norm>(plan.packs, whole), arguments);
}

}  // namespace norm

// By a norm of numbers of a type: see centred.cuh.
template <template <class> class Norm>
Status norm_rows(Stream stream, const NormRows& call) {
  if (call.rows.elements() == 0) return kSuccess;
  return with_type(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = norm::normalise<Norm<T>, 4, true>;
    const RowPlan plan =
        plan_rows(call.rows.width, kVector<T>, kernel, norm::tuning<Norm<T>>(call));
    return norm::run<Norm<T>>(stream, call, plan);
  });
}

template <template <class> class Norm>
Status load_norm_rows(DType dtype) {
  using namespace norm;
  return with_type(dtype, [](auto type) {
    using Of = Norm<typename decltype(type)::type>;
    for (const auto kernel :
         {ring_for<Of>(4, true), ring_for<Of>(2, false), ring_for<Of>(4, false)}) {
      const Status status = load_large(kernel);
      if (status != kSuccess) return status;
    }
    return load_kernels(kernel_for<Of>(2, true), kernel_for<Of>(4, true), kernel_for<Of>(8, true),
                        kernel_for<Of>(2, false), normalise_stream<Of, true>,
                        normalise_stream<Of, false>);
  });
}

}  // namespace syntonic
