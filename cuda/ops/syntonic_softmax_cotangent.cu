#include "ops/softmax_cotangent_columns.cuh"

namespace syntonic {
// syntonic_softmax_planes_cotangent.cu
Status load_syntonic_softmax_planes_cotangent(DType dtype);
Status syntonic_softmax_planes_cotangent(Stream stream, const SyntonicSoftmaxCotangent& call);

namespace {

// Rows that are staged or streamed; their column sums are a kernel of its own, which finds s of
// every row at the front of the scratch memory.
template <Pull kPull, class T, class F>
Status run_apart(const SyntonicSoftmaxCotangent& call, Stream stream, int team, bool aligned,
                 F&& run) {
  using A = Acc<T>;
  A* scratch = static_cast<A*>(call.scratch);
  const int64_t kept = call.d_bias ? ceil_div(call.logits.shape.rows(), 4) * 4 : 0;
  if (kept > call.scratch_size) return cudaErrorInvalidValue;
  PullArguments<T> arguments = pull_arguments<T>(call, team);
  arguments.row_sums = call.d_bias ? scratch : nullptr;
  const Status status = run(arguments);
  if (status != kSuccess || !call.d_bias) return status;
  return sum_columns<kPull>(stream, arguments, aligned, call.partials, static_cast<A*>(call.d_bias),
                            scratch + kept, call.scratch_size - kept);
}

template <Pull kPull, bool kPlain, class T>
Status run_held(Stream stream, const SyntonicSoftmaxCotangent& call) {
  using A = Acc<T>;
  const Planes& shape = call.logits.shape;
  A* d_bias = static_cast<A*>(call.d_bias);
  const RowPlan plan =
      plan_rows(shape.width, kVector<T>, pull_rows<kPull, kPlain, T, 4>, kSoftmaxCotangent);
  Grid grid = grid_of_rows(plan, shape.rows());
  const auto kernel =
      plan.packs == 2 ? pull_rows<kPull, kPlain, T, 2> : pull_rows<kPull, kPlain, T, 4>;
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
                          return launch(stream, grid, kernel, pull_arguments<T>(call, plan.team),
                                        workers, sums.first, stride);
                        });
}

template <Pull kPull, class T>
Status run_rows(Stream stream, const SyntonicSoftmaxCotangent& call) {
  const SoftmaxLogits& logits = call.logits;
  const int64_t width = logits.shape.width;
  const T* x = static_cast<const T*>(call.y ? call.y : logits.x);
  const bool vector = alike(x, logits.weights, call.ct, call.d_z);
  const bool whole = vector && width % kVector<T> == 0 && all_aligned(x);
  const bool aligned = whole && all_aligned(call.d_bias, call.scratch);
  if constexpr (kHeld<T>) {
    if (aligned && width / kVector<T> <= kRowPacks) {
      const bool bare = plain(logits) && !call.d_bias;
      return bare ? run_held<kPull, true, T>(stream, call)
                  : run_held<kPull, false, T>(stream, call);
    }
    if (vector && !whole && !call.d_bias && width <= kTileWidth) {
      return syntonic_softmax_planes_cotangent(stream, call);
    }
    const StagePlan plan = plan_stages(width * sizeof(T), 2, kLargeCluster, pull_staged<kPull, T>);
    if (vector && plan.blocks > 0) {
      return run_apart<kPull, T>(call, stream, plan.team(), aligned, [&](const auto& arguments) {
        return launch(stream, plan.grid(logits.shape.rows()), pull_staged<kPull, T>, arguments);
      });
    }
  }
  const RowPlan plan = plan_stream<T>(width, logits.shape.rows());
  return run_apart<kPull, T>(call, stream, plan.team, aligned, [&](const auto& arguments) {
    return launch(stream, grid_of_rows(plan, logits.shape.rows()), pull_stream<kPull, T>, arguments,
                  vector);
  });
}

template <Pull kPull, class T>
Status load_kernels_of() {
  Status status =
      load_kernels(pull_stream<kPull, T>, pull_column_sums<kPull, T>, fold_columns<Acc<T>>);
  if constexpr (kHeld<T>) {
    if (status == kSuccess) {
      status = load_kernels(pull_rows<kPull, true, T, 2>, pull_rows<kPull, true, T, 4>,
                            pull_rows<kPull, false, T, 2>, pull_rows<kPull, false, T, 4>);
    }
    if (status == kSuccess) status = load_large(pull_staged<kPull, T>);
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
  if (shape.inner > 1) return syntonic_softmax_planes_cotangent(stream, call);
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return call.y ? run_rows<Pull::softmax, T>(stream, call)
                  : run_rows<Pull::log_softmax, T>(stream, call);
  });
}

Status load_syntonic_softmax_cotangent(DType dtype) {
  const Status status = with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    const Status status = load_kernels_of<Pull::softmax, T>();
    return status == kSuccess ? load_kernels_of<Pull::log_softmax, T>() : status;
  });
  return status == kSuccess ? load_syntonic_softmax_planes_cotangent(dtype) : status;
}

}  // namespace syntonic
