#include "ops/softmax_cotangent_columns.cuh"
#include "ops/syntonic_cross_entropy.h"

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
  int64_t group_rows;  // 0: one group, no division needed
  int width;
  int team;
  int ignored;  // a label below 0 that is out of use; 0: none

  __device__ int64_t group(int64_t row) const {
    return group_rows == 0 || row >= rows ? 0 : row / group_rows;
  }
};

// A team reads its row once.
template <bool kPlain, class T>
__global__ void __launch_bounds__(kStreamThreads, kPlain ? 4 : 2)
    cross_entropy_rows(const Arguments<T> a, bool vector) {
  wait_for_launches();
  using A = Acc<T>;
  __shared__ Exchange<MaxSum<A>, 1> exchange;
  const Team team(a.team);
  Reducer<MaxSum<A>, 1> reduce(exchange, team);
  const int64_t row = team.number();
  const Stretch<T> of = stretch_of_row(a.logits.x, row, a.rows, a.width, vector);
  const LogitStream<kPlain, T> logits(a.logits, of, a.group(row), a.width);
  // What one thread reads apart is on its way while all read the row, and while they meet.
  const bool writes = team.rank == 0 && row < a.rows;
  const int label = writes ? a.labels[row] : -1;
  const MaxSum<A> own = logits.max_sum(team);
  bool present;
  const bool counts = writes && label_counts(a.logits, row, a.width, label);
  const A chosen = counts ? logit_at(a.logits, logits.scale, logits.row, label, present) : A(0);
  const MaxSum<A> total = reduce.all(own);
  if (!writes) return;
  const A log_sum = log(total.sum);
  if (total.sum == A(0)) {
    a.loss[row] = A(0);  // nothing counts
  } else if (counts) {
    a.loss[row] = (total.max - chosen) + log_sum;
  } else if (label >= 0 && label < a.width) {
    a.loss[row] = kInfinity<A>;
  } else {
    a.loss[row] = label < 0 && label == a.ignored ? A(0) : kNaN<A>;
  }
  if (!a.max) return;
  // Nothing that a row without a gradient leaves behind need be a number.
  a.max[row] = counts ? total.max : A(0);
  a.log_sum[row] = counts ? log_sum : A(0);
}

// Teams on pieces of a row: s is known, and every element is for itself. `team` is not Team: a row
// may take several blocks that know nothing of each other.
template <bool kPlain, class T>
__global__ void __launch_bounds__(kPieceThreads, 4)
    pull_pieces(const PullArguments<T> a, int pieces, bool vector) {
  wait_for_launches();
  using A = Acc<T>;
  constexpr int N = kVector<T>;
  const int thread = static_cast<int>(threadIdx.x), teams = kPieceThreads / a.team;
  const int piece = static_cast<int>(blockIdx.x % pieces);
  const int rank = thread % a.team + piece * a.team * kPiecePacks;
  const int64_t row = int64_t{blockIdx.x} / pieces * teams + thread / a.team;
  const Stretch<T> packs = stretch_of_row(a.logits.x, row, a.rows, a.width, vector);
  const PullRow<Pull::cross_entropy, T> of(a, row);
  Packed<T, N> x[kPiecePacks] = {};
#pragma unroll
  for (int k = 0; k < kPiecePacks; ++k) {
    const int pack = rank + k * a.team;
    if (pack < packs.packs) x[k] = of.raw(packs.first(pack));
  }
  // Or the loss is no function of the logits.
  const bool any = row < a.rows && label_counts(a.logits, row, a.width, of.label);
  const A s = any ? a.row_ct[row] : A(0);
  A ct[N];
#pragma unroll
  for (int k = 0; k < kPiecePacks; ++k) {
    const int pack = rank + k * a.team, at = packs.first(pack);
    if (pack >= packs.packs) continue;
    A p[N];
    const uint32_t present = of.template read<kPlain>(at, x[k], {}, p, ct);
    of.pull(s, at, any ? present : 0, ct, p);
    write_pack(a.d_z + packs.start + at, syntonic::pack<T>(p));
  }
  for (int i = thread % a.team + piece * a.team; i < packs.edges(); i += pieces * a.team) {
    const int at = packs.edge(i);
    A p, no_ct;
    const bool present = of.read_at(at, p, no_ct);
    a.d_z[packs.start + at] = narrow<T>(of.pull_at(s, at, any && present, no_ct, p));
  }
}

}  // namespace

Status syntonic_cross_entropy(Stream stream, const SyntonicCrossEntropy& call) {
  const Planes& shape = call.logits.shape;
  if (shape.elements() == 0) return kSuccess;
  return with_type(call.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const RowPlan plan = plan_stream<T>(shape.width, shape.rows());
    const Arguments<T> arguments = {
        Logits<T>(call.logits),
        call.labels,
        static_cast<A*>(call.loss),
        static_cast<A*>(call.max),
        static_cast<A*>(call.log_sum),
        shape.rows(),
        shape.groups == 1 ? 0 : shape.outer,
        static_cast<int>(shape.width),
        plan.team,
        call.ignored,
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
    const int64_t turns = ceil_div(ceil_div(shape.width, kVector<T>), kPiecePacks);
    int team = 1;
    while (team < kPieceThreads && team < turns) team *= 2;
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
        .group_rows = shape.groups == 1 ? 0 : shape.outer,
        .width = static_cast<int>(shape.width),
        .team = team,
    };
    Status status = kSuccess;
    if (call.d_z) {
      const int64_t pieces = ceil_div(turns, team);
      const int64_t blocks = ceil_div(shape.rows(), kPieceThreads / team) * pieces;
      status = launch(stream, {blocks, kPieceThreads},
                      plain(call.logits) ? pull_pieces<true, T> : pull_pieces<false, T>, arguments,
                      pieces, alike(call.logits.x, call.logits.weights, call.d_z));
    }
    if (status != kSuccess || !call.d_bias) return status;
    const bool aligned = shape.width % kVector<T> == 0 &&
                         all_aligned(call.logits.x, call.logits.weights, call.d_bias, call.scratch);
    return sum_columns<kPull, T>(stream, arguments, aligned, call.partials,
                                 static_cast<A*>(call.d_bias), static_cast<A*>(call.scratch),
                                 call.scratch_size);
  });
}

Status load_syntonic_cross_entropy(DType dtype) {
  return with_type(dtype, [](auto type) {
    using T = typename decltype(type)::type;
    return load_kernels(cross_entropy_rows<true, T>, cross_entropy_rows<false, T>,
                        pull_pieces<true, T>, pull_pieces<false, T>,
                        pull_column_sums<Pull::cross_entropy, T>, fold_columns<Acc<T>>);
  });
}

}  // namespace syntonic
