#include "softmax_cotangent.cuh"
#include "syntonic_cross_entropy.h"

namespace syntonic {
namespace {

template <class T>
struct Arguments {
  using A = Acc<T>;

  Logits<T> logits;
  const int32_t* labels;
  A* loss;
  A* max;
  A* log_sum;
  int64_t rows;
  int64_t group_rows;
  int width;
  int team;
  bool shifted;
};

template <class T>
__device__ Acc<T> logit_at(const Logits<T>& from, Acc<T> scale, int64_t row_start,
                           int64_t parameters, int label) {
  const Span at = {label, 1, label + 1};
  Acc<T> z[kVector<T>];
  load_logits(from, scale, row_start, parameters, at, false, z);
  return z[0];
}

// A team reads its row once, in chunks of kStreamPacks packs a thread.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_rows(const Arguments<T> a, bool aligned) {
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = int64_t{blockIdx.x} / team.blocks * team.count + team.index;
  const RowAccess<N> access(aligned, a.shifted, row, a.rows, a.width);
  const int64_t group = row < a.rows ? row / a.group_rows : 0;
  const A scale = a.logits.weights ? a.logits.scale[group] : A(0);
  const int turns = access.turns(team);
  MaxSum<A> total;
  for (int turn = 0; turn < turns; turn += kStreamPacks) {
    A z[kStreamPacks][N];
    uint32_t present[kStreamPacks];
#pragma unroll
    for (int k = 0; k < kStreamPacks; ++k) {
      present[k] = load_logits(a.logits, scale, access.start, group * a.width - access.begin,
                               access.at(turn + k, team), aligned, z[k]);
    }
    total = MaxSum<A>::merge(total, max_sum_of(z, present));
  }
  total = reduce.all(total);
  if (team.rank != 0 || row >= a.rows) return;
  const int label = a.labels[row];
  const A log_sum = log(total.sum);
  A loss = 0;
  if (total.sum == A(0)) {
    // Nothing counts.
  } else if (label_counts(a.logits, row, a.width, label)) {
    const A z = logit_at(a.logits, scale, row * a.width, group * a.width, label);
    loss = (total.max - z) + log_sum;
  } else {
    loss = label < 0 || label >= a.width ? kNaN<A> : kInfinity<A>;
  }
  a.loss[row] = loss;
  if (!a.max) return;
  a.max[row] = total.max;
  a.log_sum[row] = log_sum;
}

}  // namespace

Status syntonic_cross_entropy(Stream stream, const SyntonicCrossEntropy& call) {
  const Planes& shape = call.logits.shape;
  if (shape.elements() == 0) return kSuccess;
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const RowPlan plan = plan_stream<T>(shape.width);
    const Arguments<T> arguments = {
        Logits<T>(call.logits),
        call.labels,
        static_cast<A*>(call.loss),
        static_cast<A*>(call.max),
        static_cast<A*>(call.log_sum),
        shape.rows(),
        shape.outer,
        static_cast<int>(shape.width),
        plan.team,
        all_aligned(call.logits.x, call.logits.weights),
    };
    return launch(stream, grid_of_rows(plan, shape.rows()), cross_entropy_rows<T>, arguments,
                  whole_packs<T>(call.logits, shape.width));
  });
}

Status syntonic_cross_entropy_cotangent(Stream stream, const SyntonicCrossEntropyCotangent& call) {
  const Planes& shape = call.logits.shape;
  const size_t bytes = call.partials * shape.width * item_size(accumulation(call.logits.dtype));
  if (shape.elements() == 0) {
    return call.d_bias && bytes ? cudaMemsetAsync(call.d_bias, 0, bytes, stream) : kSuccess;
  }
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    constexpr Pull kPull = Pull::cross_entropy;
    const RowPlan plan = plan_stream<T>(shape.width);
    const PullArguments<T> arguments = {
        .logits = Logits<T>(call.logits),
        .y = nullptr,
        .max = static_cast<const A*>(call.max),
        .log_sum = static_cast<const A*>(call.log_sum),
        .ct = nullptr,
        .labels = call.labels,
        .row_ct = static_cast<const A*>(call.ct),
        .d_z = static_cast<T*>(call.d_z),
        .row_sums = nullptr,
        .rows = shape.rows(),
        .group_rows = shape.outer,
        .width = static_cast<int>(shape.width),
        .inner = 1,
        .team = plan.team,
        .shifted = all_aligned(call.logits.x, call.logits.weights, call.d_z),
    };
    Status status = kSuccess;
    if (call.d_z) {
      status = launch(stream, grid_of_rows(plan, shape.rows()), pull_stream<kPull, T>, arguments,
                      whole_packs<T>(call.logits, shape.width, call.d_z));
    }
    if (status != kSuccess || !call.d_bias) return status;
    return sum_columns<kPull, T>(
        stream, arguments, whole_packs<T>(call.logits, shape.width, call.d_bias, call.scratch),
        call.partials, static_cast<A*>(call.d_bias), static_cast<A*>(call.scratch),
        call.scratch_size);
  });
}

Status load_syntonic_cross_entropy(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    constexpr Pull kPull = Pull::cross_entropy;
    return load_kernels(cross_entropy_rows<T>, pull_stream<kPull, T>, pull_columns<kPull, T>,
                        fold_columns<Acc<T>>);
  });
}

}  // namespace syntonic
