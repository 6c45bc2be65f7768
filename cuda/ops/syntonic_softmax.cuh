// What the forward kernels of softmax share: their arguments, and what a row turns its logits into.
#pragma once

#include "ops/softmax_row.cuh"

namespace syntonic {

template <class T>
struct SoftmaxArguments {
  using A = Acc<T>;

  SoftmaxArguments(const SyntonicSoftmax& call, int team)
      : logits(call.logits),
        y(static_cast<T*>(call.y)),
        max(static_cast<A*>(call.max)),
        log_sum(static_cast<A*>(call.log_sum)),
        rows(call.logits.shape.rows()),
        group_rows(call.logits.shape.groups == 1 ? 0 : call.logits.shape.outer),
        width(static_cast<int>(call.logits.shape.width)),
        team(team),
        log(call.log) {}

  Logits<T> logits;
  T* y;
  A* max;
  A* log_sum;
  int64_t rows;
  int64_t group_rows;  // 0: one group, no division needed
  int width;
  int team;  // threads of a row; along an inner axis the blocks of a plane
  bool log;

  __device__ int64_t group(int64_t row) const {
    return group_rows == 0 || row >= rows ? 0 : row / group_rows;
  }
};

// What a row has come to: turns logits into results, and is stored for the backward pass.
template <class T>
struct Outcome {
  using A = Acc<T>;
  MaxSum<A> total;
  A base;
  A share;  // of a lifted exponential relative to base
  A log_sum;

  __device__ Outcome(const SoftmaxArguments<T>& a, bool keep, int64_t row, const MaxSum<A>& total)
      : total(total),
        base(MaxSum<A>::base(total.max)),
        share(total.share(total.max) / kLift<T>),
        log_sum(log(total.sum)) {
    if (!a.max || !keep) return;
    a.max[row] = total.max;
    a.log_sum[row] = log_sum;
  }

  __device__ A of(const SoftmaxArguments<T>& a, A z, bool present) const {
    if (a.log) return present ? (z - total.max) - log_sum : -kInfinity<A>;
    return present ? lifted_exponential<T>(z - base) * share : A(0);
  }

  template <int N>
  __device__ void store(const SoftmaxArguments<T>& a, int64_t element, uint32_t present,
                        A (&z)[N]) const {
    if (a.log) {
#pragma unroll
      for (int e = 0; e < N; ++e) z[e] = (z[e] - total.max) - log_sum;
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) z[e] = lifted_exponential<T>(z[e] - base) * share;
    }
    if (present != kAll<N>) hide_absent(present, z, a.log ? -kInfinity<A> : A(0));
    write_pack(a.y + element, pack<T>(z));
  }
};

}  // namespace syntonic
