#include "engine/row_ring.cuh"
#include "ops/phi_residual_layernorm_cotangent.cuh"

namespace syntonic {
namespace {

using namespace layernorm_cotangent;

// What the ring holds of a pack: z, ct_z where there is one, and ct_y, in this order, `stride`
// pieces apart.
template <class T>
__device__ void fetch_pack(const Arguments<T>& a, uint4* pack, int stride, int64_t start,
                           const Span& at, bool vector) {
  constexpr int N = kVector<T>;
  stage<T, N>(pack, stride, a.z + start, at, vector);
  if (a.ct_z) stage<T, N>(pack + stride, stride, a.ct_z + start, at, vector);
  stage_any<N>(a.ct_y, pack + a.ct_y_piece * stride, stride, start, at, vector);
}

template <class T>
__device__ void read_pack(const Arguments<T>& a, const uint4* pack, int stride,
                          const Normaliser<T>& normal, Acc<T> (&xhat)[kVector<T>],
                          Acc<T> (&ct)[kVector<T>]) {
  unpack(staged<T, kVector<T>>(pack, stride), xhat);
  normalise<T>(xhat, normal);
  unpack_staged(a.ct_y, pack + a.ct_y_piece * stride, stride, ct);
}

template <class T>
__device__ Packed<T, kVector<T>> read_ct_z(const Arguments<T>& a, const uint4* pack, int stride) {
  if (!a.ct_z) return {};
  return staged<T, kVector<T>>(pack + stride, stride);
}

// Rows that fit, K packs a thread, on a persistent grid. The rows to come are on their way, and the
// next one is summed up before the gradient of this one is written, so that no thread waits for the
// reduction. The parameter gradients gather in registers. Needs two stages of the ring.
template <class T, int K, bool kAligned, bool kEarly = false>
__global__ void __launch_bounds__(K == 1 ? kFewThreads : kMaxThreads, K == 1 ? 2 : 1)
    pull_back(const Arguments<T> a, const Workers workers, const Sums<Acc<T>> sums,
              const int stages) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  constexpr bool kHoldScale = K <= 2;  // more would not fit into the registers
  extern __shared__ __align__(16 * kLine) uint4 dynamic[];
  __shared__ Exchange<SumPair<A>> exchange;
  const Team team(a.team);
  Reducer<SumPair<A>> reduce(exchange, team);
  const Ring<K> ring(dynamic, a.pieces, team, a.width * sizeof(T));
  const int stride = ring.stride, pack_stride = ring.pieces * stride;
  const int width = static_cast<int>(a.width);
  const A inverse_width = A(1) / width;
  const int64_t step = workers.members * team.count;
  const auto at = [&](int k, bool present) {
    return span<N>(kAligned, k, team.size, team.rank, present ? width : 0);
  };

  for (int64_t unit = cluster_index(); unit < workers.partials * workers.members;
       unit += gridDim.x / team.blocks) {
    const int64_t partial = unit / workers.members;
    const int64_t end = (partial + 1) * workers.rows;
    const auto fetch = [&](int turn, int64_t row) {
      const bool present = row < end;  // an idle team reads zeros
#pragma unroll
      for (int k = 0; k < K; ++k) {
        fetch_pack(a, ring.packs_of(row, turn) + k * pack_stride, stride, present ? row * width : 0,
                   at(k, present), kAligned);
      }
      commit_copies();
    };
    const int64_t parameters = partial / a.partials_per_group * width;
    A held[K][N], d_scale[K][N] = {}, d_bias[K][N] = {};
    if constexpr (kHoldScale) {
#pragma unroll
      for (int k = 0; k < K; ++k) load_scale(a, parameters, at(k, true), kAligned, held[k]);
    }
    const auto scale_of = [&](int k, A(&scale)[N]) {
      if constexpr (kHoldScale) {
#pragma unroll
        for (int e = 0; e < N; ++e) scale[e] = held[k][e];
      } else {
        load_scale(a, parameters, at(k, true), kAligned, scale);
      }
    };
    // The first half of a row: what it adds to the sums along it and across it.
    const auto sum_up = [&](int turn, int64_t row, const Normaliser<T>& normal) {
      const uint4* packs = ring.packs_of(row, turn);
      SumPair<A> sums;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        A xhat[N], ct[N], scale[N];
        read_pack(a, packs + k * pack_stride, stride, normal, xhat, ct);
        scale_of(k, scale);
        add_products(sums, xhat, ct, scale);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          d_scale[k][e] += ct[e] * xhat[e];
          d_bias[k][e] += ct[e];
        }
      }
      reduce.post(sums);
    };
    // The second half: its gradient.
    const auto finish = [&](int turn, int64_t row, const Normaliser<T>& normal,
                            const SumPair<A>& means) {
      const uint4* packs = ring.packs_of(row, turn);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        A xhat[N], ct[N], scale[N];
        read_pack(a, packs + k * pack_stride, stride, normal, xhat, ct);
        scale_of(k, scale);
        store_gradients(a, row * width, at(k, row < end), kAligned, normal.slope() * a.scale_factor,
                        xhat, ct, scale, read_ct_z(a, packs + k * pack_stride, stride), means);
      }
    };

    // All teams of the block make the same number of turns, `first` being the row of the first.
    int64_t first = partial * workers.rows + unit % workers.members * team.count;
    int64_t row = first + team.index;
    for (int turn = 0; turn < stages; ++turn) fetch(turn, row + turn * step);
    // Zeros for an idle team: no NaN may reach its sums.
    const auto statistics = [&](int64_t row) {
      return row < end ? a.statistics[row] : RowStatistics<A>{};
    };
    Normaliser<T> normal(statistics(row));
    RowStatistics<A> next_row = statistics(row + step);
    wait_copies(stages - 1);
    sum_up(0, row, normal);
    for (int turn = 0; first < end; first += step, row += step) {
      SumPair<A> means = reduce.collect();
      means.first *= inverse_width;
      means.second *= inverse_width;
      const int next_turn = turn + 1 == stages ? 0 : turn + 1;
      const int64_t next = row + step;
      RowStatistics<A> later_row;
      if constexpr (kEarly) {
        later_row = statistics(next + step);
      } else {
        next_row = statistics(next);
      }
      const Normaliser<T> next_normal(next_row);
      if (first + step < end) {
        wait_copies(stages - 2);
        sum_up(next_turn, next, next_normal);
      }
      finish(turn, row, normal, means);
      __syncwarp();
      fetch(turn, row + stages * step);
      turn = next_turn;
      normal = next_normal;
      if constexpr (kEarly) next_row = later_row;
    }
    wait_copies(0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      store_sums(a, team, sums, unit * sums.stride, at(k, true), kAligned, d_scale[k], d_bias[k],
                 reinterpret_cast<A*>(dynamic));
    }
    // Before the ring is filled again: by its own warp, or by teams that shared its memory.
    if (team.count > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
}

// Rows of any width, without parameter gradients: read twice, the second time from the L2 cache if
// it holds them.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back_stream(const Arguments<T> a, bool aligned) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<SumPair<A>> exchange;
  const Team team(a.team);
  Reducer<SumPair<A>> reduce(exchange, team);
  const int64_t row = team.number();
  const int64_t start = row * a.width;
  const int64_t parameters = row / a.group_rows * a.width;
  const Normaliser<T> normal(a.statistics[row]);
  const int stretch = N * team.size;
  const auto span_at = [&](int64_t offset) {
    const int64_t end = a.width - offset < stretch ? a.width - offset : stretch;
    return span<N>(aligned, 0, team.size, team.rank, static_cast<int>(end));
  };
  const auto read = [&](int64_t offset, const Span& at, A(&xhat)[N], A(&ct)[N], A(&scale)[N]) {
    unpack(load<T, N>(a.z + start + offset, at, aligned), xhat);
    normalise<T>(xhat, normal);
    unpack_any(load_any<A, N>(a.ct_y, start + offset, at, aligned), a.ct_y.dtype, ct);
    load_scale(a, parameters + offset, at, aligned, scale);
  };

  SumPair<A> means;
#pragma unroll 2
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    A xhat[N], ct[N], scale[N];
    read(offset, span_at(offset), xhat, ct, scale);
    add_products(means, xhat, ct, scale);
  }
  means = reduce.all(means);
  means.first /= a.width;
  means.second /= a.width;
  const A slope = normal.slope() * a.scale_factor;
  for (int64_t offset = 0; offset < a.width; offset += stretch) {
    const Span at = span_at(offset);
    Packed<T, N> ct_z = {};
    if (a.ct_z) ct_z = load<T, N>(a.ct_z + start + offset, at, aligned);
    A xhat[N], ct[N], scale[N];
    read(offset, at, xhat, ct, scale);
    store_gradients(a, start + offset, at, aligned, slope, xhat, ct, scale, ct_z, means);
  }
}

// The parameter gradients of rows of any width: a team of one warp for each tile of columns.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    pull_back_columns(const Arguments<T> a, const Workers workers, const Sums<Acc<T>> sums,
                      bool aligned) {
  wait_for_launches();
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
    normalise<T>(xhat, Normaliser<T>(a.statistics[row]));
    unpack_any(load_any<A, N>(a.ct_y, start, at, aligned), a.ct_y.dtype, ct);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      d_scale[e] += ct[e] * xhat[e];
      d_bias[e] += ct[e];
    }
  }
  store_sums(a, team, sums, unit * sums.stride + offset, at, aligned, d_scale, d_bias, shared);
}

template <class T>
constexpr auto kernel_for(const RowPlan& plan, bool aligned) {
  if constexpr (sizeof(T) == 2) {  // what the tables for wider types do not ask for
    if (aligned && plan.packs == 3) return pull_back<T, 3, true>;
    if (aligned && plan.packs == 1 && plan.early) return pull_back<T, 1, true, true>;
  }
  return !aligned          ? pull_back<T, kCotangentUnaligned.step[0].packs, false>
         : plan.packs == 1 ? pull_back<T, 1, true>
         : plan.packs == 4 ? pull_back<T, 4, true>
         : plan.early      ? pull_back<T, 2, true, true>
                           : pull_back<T, 2, true>;
}

template <class T>
bool vector_access(const PhiResidualLayernormCotangent& call) {
  return call.rows.width % kVector<T> == 0 &&
         all_aligned(call.z, call.scale, call.ct_y, call.ct_z, call.d_identity, call.d_residual,
                     call.d_scale, call.d_bias, call.scratch);
}

template <class T>
const RowTuning& tuning(const PhiResidualLayernormCotangent& call) {
  if (!vector_access<T>(call)) return kCotangentUnaligned;
  if (sizeof(T) == 2) return call.ct_z ? kCotangent16 : kPlainCotangent16;
  return call.ct_z ? kCotangent : kPlainCotangent;
}

// sum(workers, sums) launches one kernel in which every unit of work stores its column sums.
template <class T, class F>
Status gather(Stream stream, const PhiResidualLayernormCotangent& call, int teams, int64_t resident,
              F&& sum) {
  using A = Acc<T>;
  const FoldTargets<A> target = {static_cast<A*>(call.d_scale), static_cast<A*>(call.d_bias)};
  const int64_t columns =
      call.rows.width * ((target.first != nullptr) + (target.second != nullptr));
  const Workers workers = plan_workers(call.partials, call.rows.total() / call.partials, teams,
                                       resident, columns, call.scratch_size);
  return gather_columns(stream, workers, call.rows.width, target, call.scratch,
                        [&](const FoldTargets<A>& sums, int64_t stride) {
                          return sum(workers, Sums<A>{sums.first, sums.second, stride});
                        });
}

template <class T>
Status run_stream(Stream stream, const PhiResidualLayernormCotangent& call, const RowPlan& plan) {
  const Arguments<T> arguments(call, plan);
  const bool aligned = vector_access<T>(call);
  if (call.d_identity || call.d_residual) {
    const int cluster = cluster_size(plan);
    const Status status = launch(stream, {call.rows.total() * cluster, plan.threads, cluster},
                                 pull_back_stream<T>, arguments, aligned);
    if (status != kSuccess) return status;
  }
  if (!call.d_scale && !call.d_bias) return kSuccess;
  const int64_t tiles = ceil_div(call.rows.width, kVector<T> * kWarp);
  const int64_t resident =
      ceil_div(resident_blocks(Grid{0, kMaxThreads}, pull_back_columns<T>), tiles);
  return gather<T>(stream, call, kMaxThreads / kWarp, resident,
                   [&](const Workers& workers, const Sums<Acc<T>>& sums) {
                     const int64_t blocks = tiles * workers.partials * workers.members;
                     return launch(stream, {blocks, kMaxThreads}, pull_back_columns<T>, arguments,
                                   workers, sums, aligned);
                   });
}

template <class T>
Status run(Stream stream, const PhiResidualLayernormCotangent& call, RowPlan plan) {
  const Arguments<T> arguments(call, plan);
  const auto kernel = kernel_for<T>(plan, vector_access<T>(call));
  size_t ring = 0;
  // Without d_identity and d_residual there is nothing to reduce along a row.
  if (plan.packs > 0 && (call.d_identity || call.d_residual)) {
    ring = fit_ring(plan, kernel, arguments.pieces, call.rows.width * sizeof(T));
  }
  if (ring == 0) {
    const RowPlan block = {0, kMaxThreads, kMaxThreads};
    return run_stream<T>(stream, call, plan.packs == 0 ? plan : block);
  }
  Grid grid = {0, plan.threads, cluster_size(plan), ring};
  const int64_t resident = resident_blocks(grid, kernel) / grid.cluster;
  return gather<T>(stream, call, teams_per_block(plan), resident,
                   [&](const Workers& workers, const Sums<Acc<T>>& sums) {
                     const int64_t units = workers.partials * workers.members;
                     grid.blocks = std::min(units, resident) * grid.cluster;
                     return launch(stream, grid, kernel, arguments, workers, sums, plan.stages);
                   });
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
    return run<T>(stream, call,
                  plan_rows(call.rows.width, kVector<T>, pull_back<T, 2, true>, tuning<T>(call)));
  });
}

Status load_phi_residual_layernorm_cotangent(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    for (const int packs : {1, 2, 3, 4}) {
      for (const bool early : {false, true}) {
        const RowPlan plan = {.packs = packs, .early = early};
        const Status status = load_with_dynamic_shared(kernel_for<T>(plan, true));
        if (status != kSuccess) return status;
      }
    }
    const Status status = load_with_dynamic_shared(kernel_for<T>({}, false));
    if (status != kSuccess) return status;
    return load_kernels(pull_back_stream<T>, pull_back_columns<T>, fold_columns<Acc<T>>);
  });
}

}  // namespace syntonic
