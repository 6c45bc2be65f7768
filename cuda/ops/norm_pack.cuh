// The arithmetic of a norm on one pack, shared by its kernels. `Norm` says what is measured of a
// row, and kept: see centred.cuh.
#pragma once

#include "core/golden.cuh"
#include "core/range.cuh"
#include "engine/rows_ring.cuh"
#include "ops/norm_rows.h"

namespace syntonic {
namespace norm {

template <class Norm>
struct Arguments {
  using T = typename Norm::T;
  using A = Acc<T>;
  using Statistics = typename Norm::Statistics;

  Arguments(const NormRows& call, const RowPlan& plan)
      : identity(static_cast<const T*>(call.identity)),
        residual(static_cast<const T*>(call.residual)),
        scale(static_cast<const A*>(call.scale)),
        bias(static_cast<const A*>(call.bias)),
        y{call.y, call.y_dtype},
        z(static_cast<T*>(call.z)),
        statistics(static_cast<Statistics*>(call.statistics)),
        rows(call.rows.total()),
        group_rows(call.rows.groups == 1 ? 0 : call.rows.count),
        width(call.rows.width),
        pieces(call.residual ? 2 : 1),
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
  Statistics* statistics;
  int64_t rows;
  int64_t group_rows;  // 0: one group, no division needed
  int64_t width;
  int pieces;  // of 16 bytes, in a pack of the ring
  int team;
  A sum_scale;
  A residual_scale;
  A epsilon;
  A scale_factor;
};

template <class T>
using RowPack = Packed<T, kVector<T>>;

template <class Norm>
using Number = typename Norm::A;

// The residual sum, rounded to T: statistics and y are those of the rounded sum. Without a residual
// the sum is identity.
template <class Norm, class T, int N>
__device__ Packed<T, N> residual_sum(const Arguments<Norm>& a, const Packed<T, N>& identity,
                                     const Packed<T, N>& residual) {
  if (!a.residual) return identity;
  Acc<T> i[N], r[N];
  unpack(identity, i);
  unpack(residual, r);
  golden_sum(i, r, a.sum_scale, a.residual_scale);
  return pack<T>(i);
}

// Where the scale and bias of this row begin.
template <class Norm>
__device__ int64_t parameter_row(const Arguments<Norm>& a, int64_t row) {
  return a.group_rows == 0 || row >= a.rows ? 0 : row / a.group_rows * a.width;
}

// Of these elements; 1 without a scale.
template <class Norm, class At, class How, int N>
__device__ void load_scale(const Arguments<Norm>& a, int64_t parameters, const At& at, How how,
                           Number<Norm> (&scale)[N]) {
  if (a.scale) return load_parameter(a.scale + parameters, at, how, scale);
#pragma unroll
  for (int e = 0; e < N; ++e) scale[e] = 1;
}

template <class Norm, class At, class How, int N>
__device__ void load_bias(const Arguments<Norm>& a, int64_t parameters, const At& at, How how,
                          Number<Norm> (&bias)[N]) {
  if (Norm::kBias && a.bias) load_parameter(a.bias + parameters, at, how, bias);
}

// y of a pack of z; `bias` is only read if there is one.
template <Cache kCache = Cache::keep, class Norm, class At, class T, int N>
__device__ void store_normalised(const Arguments<Norm>& a, int64_t start, const At& at, bool vector,
                                 const Packed<T, N>& z, const typename Norm::Normal& normal,
                                 const Acc<T> (&scale)[N], const Acc<T> (&bias)[N]) {
  Acc<T> y[N];
  unpack(z, y);
#pragma unroll
  for (int e = 0; e < N; ++e) y[e] = normal(y[e]);
  if (Norm::kBias && a.bias) {
#pragma unroll
    for (int e = 0; e < N; ++e) y[e] = y[e] * scale[e] + bias[e];
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) y[e] *= scale[e];
  }
  store_any<T, kCache>(a.y, start, at, vector, y);
}

// Whether squares of numbers of this type can leave the range of their accumulation type.
template <class T>
constexpr bool kMayLeaveRange = !std::is_same_v<T, f16>;

// One number of z.
template <class Norm>
__device__ Number<Norm> residual_sum(const Arguments<Norm>& a, int64_t i) {
  using A = Number<Norm>;
  A z[1] = {static_cast<A>(a.identity[i])};
  if (!a.residual) return z[0];
  const A residual[1] = {static_cast<A>(a.residual[i])};
  golden_sum(z, residual, a.sum_scale, a.residual_scale);
  return static_cast<A>(narrow<typename Norm::T>(z[0]));
}

// The statistics of a row of any range, by one warp, number by number from memory.
template <class Norm>
__device__ typename Norm::Statistics statistics_again(const Arguments<Norm>& a, int64_t row) {
  const int64_t start = row * a.width;
  return Norm::rescaled(a.width, a.epsilon, [&](auto f) {
#pragma unroll 1
    for (int64_t j = threadIdx.x % kWarp; j < a.width; j += kWarp) f(residual_sum(a, start + j));
  });
}

// The statistics of this thread's row, `found` unless it is `odd`: then its squares have left the
// range. Such a row is rare: this takes what time it takes. For all threads of a warp at once.
template <class Norm>
__device__ typename Norm::Statistics settled(const Arguments<Norm>& a, bool odd, int64_t row,
                                             typename Norm::Statistics found) {
  for (unsigned left = __ballot_sync(0xffffffffu, odd); left != 0;) {
    const int64_t next = __shfl_sync(0xffffffffu, row, __ffs(static_cast<int>(left)) - 1);
    left &= ~__ballot_sync(0xffffffffu, row == next);
    if (next >= a.rows) continue;
    const typename Norm::Statistics of_next = statistics_again(a, next);
    if (row == next) found = of_next;
  }
  return found;
}

}  // namespace norm
}  // namespace syntonic
