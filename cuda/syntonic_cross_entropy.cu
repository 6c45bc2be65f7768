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
};

// A team reads its row once. Its last thread, which may have less to read than others, looks after
// the label meanwhile.
template <bool kPlain, class T>
__global__ void __launch_bounds__(kStreamThreads, 4)
    cross_entropy_rows(const Arguments<T> a, bool vector) {
  using A = Acc<T>;
  __shared__ Exchange<MaxSum<A>> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>> reduce(exchange, team);
  const int64_t row = int64_t{blockIdx.x} / team.blocks * team.count + team.index;
  const Stretch<T> of(a.logits.x, row, a.rows, a.width, vector);
  const LogitStream<kPlain, T> logits(a.logits, of, row < a.rows ? row / a.group_rows : 0, a.width);
  const bool last = team.rank == team.size - 1 && row < a.rows;
  const int label = last ? a.labels[row] : 0;
  bool counts = false;
  A chosen = 0;
  if (last && label_counts(a.logits, row, a.width, label)) {
    chosen = logit_at(a.logits, logits.scale, of.start + label, logits.parameters + label, counts);
  }
  const MaxSum<A> total = reduce.all(logits.max_sum(team));
  if (!last) return;
  const A log_sum = log(total.sum);
  if (total.sum == A(0)) {
    a.loss[row] = A(0);  // nothing counts
  } else if (counts) {
    a.loss[row] = (total.max - chosen) + log_sum;
  } else {
    a.loss[row] = label < 0 || label >= a.width ? kNaN<A> : kInfinity<A>;
  }
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
    };
    return launch(stream, grid_of_rows(plan, shape.rows()),
                  plain(call.logits) ? cross_entropy_rows<true, T> : cross_entropy_rows<false, T>,
                  arguments, alike(call.logits.x, call.logits.weights));
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
        .team = plan.team,
    };
    Status status = kSuccess;
    if (call.d_z) {
      status = launch(stream, grid_of_rows(plan, shape.rows()), pull_stream<kPull, T>, arguments,
                      alike(call.logits.x, call.logits.weights, call.d_z));
    }
    if (status != kSuccess || !call.d_bias) return status;
    const bool aligned =
        shape.width % kVector<T> == 0 &&
        all_aligned(call.logits.x, call.logits.weights, call.d_bias, call.scratch);
    return sum_columns<kPull, T>(stream, arguments, aligned, call.partials,
                                 static_cast<A*>(call.d_bias), static_cast<A*>(call.scratch),
                                 call.scratch_size);
  });
}

Status load_syntonic_cross_entropy(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    constexpr Pull kPull = Pull::cross_entropy;
    return load_kernels(cross_entropy_rows<true, T>, cross_entropy_rows<false, T>, pull_stream<kPull, T>, pull_columns<kPull, T>,
                        fold_columns<Acc<T>>);
  });
}

}  // namespace syntonic
