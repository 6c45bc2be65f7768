// The arithmetic of the cotangent of a norm on one pack, shared by its kernels. `Norm` is as in the
// forward pass.
#pragma once

#include "engine/rows_ring.cuh"
#include "ops/norm_rows.h"

namespace syntonic {
namespace norm_cotangent {

template <class Norm>
struct Arguments {
  using T = typename Norm::T;
  using A = Acc<T>;
  using Statistics = typename Norm::Statistics;

  Arguments(const NormRowsCotangent& call, const RowPlan& plan)
      : z(static_cast<const T*>(call.z)),
        statistics(static_cast<const Statistics*>(call.statistics)),
        scale(static_cast<const A*>(call.scale)),
        ct_y{const_cast<void*>(call.ct_y), call.y_dtype},
        ct_z(static_cast<const T*>(call.ct_z)),
        d_identity(static_cast<T*>(call.d_identity)),
        d_residual(static_cast<T*>(call.d_residual)),
        rows(call.rows.total()),
        width(call.rows.width),
        group_rows(call.rows.count),
        partials_per_group(call.partials / call.rows.groups),
        ct_y_piece(call.ct_z ? 2 : 1),
        pieces(ct_y_piece + static_cast<int>(ceil_div(kVector<T> * item_size(call.y_dtype), 16))),
        team(plan.team),
        identity_scale(static_cast<A>(call.identity_scale)),
        residual_scale(static_cast<A>(call.residual_scale)),
        scale_factor(static_cast<A>(call.scale_factor)) {}

  const T* z;
  const Statistics* statistics;
  const A* scale;
  AnyArray ct_y;
  const T* ct_z;
  T* d_identity;
  T* d_residual;
  int64_t rows;
  int64_t width;
  int64_t group_rows;
  int64_t partials_per_group;
  int ct_y_piece;  // the first of ct_y in the ring
  int pieces;      // of 16 bytes, in a pack of the ring
  int team;
  A identity_scale;
  A residual_scale;
  A scale_factor;
};

// Where each unit of work leaves its parameter gradients: the results themselves or scratch.
template <class A>
struct Sums {
  A* d_scale;
  A* d_bias;
  int64_t stride;  // from unit to unit
};

template <class A, int N, class Normal>
__device__ void normalise(A (&x)[N], const Normal& normal) {
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = normal(x[e]);
}

// dz = rstd * (w - across(x)) + ct_z for elements x of z, where scale_factor has been moved out of
// w and its means into `rstd`.
template <class Norm, class At, class T, int N>
__device__ void store_gradients(const Arguments<Norm>& a, int64_t start, const At& at, bool vector,
                                Acc<T> rstd, const Acc<T> (&x)[N], const Acc<T> (&ct)[N],
                                const Acc<T> (&scale)[N], const Packed<T, N>& ct_z,
                                const typename Norm::Across& across) {
  Acc<T> dz[N], d[N];
  unpack(ct_z, dz);
#pragma unroll
  for (int e = 0; e < N; ++e) dz[e] += rstd * (ct[e] * scale[e] - across(x[e]));
  if (a.d_identity) {
#pragma unroll
    for (int e = 0; e < N; ++e) d[e] = a.identity_scale * dz[e];
    store<Cache::once>(a.d_identity + start, at, vector, pack<T>(d));
  }
  if (a.d_residual) {
#pragma unroll
    for (int e = 0; e < N; ++e) d[e] = a.residual_scale * dz[e];
    store<Cache::once>(a.d_residual + start, at, vector, pack<T>(d));
  }
}

// scale for one pack; scale_factor is left to whoever uses it.
template <class Norm, class At, class How, int N>
__device__ void load_scale(const Arguments<Norm>& a, int64_t group_start, const At& at, How how,
                           typename Norm::A (&scale)[N]) {
  if (a.scale) return load_parameter(a.scale + group_start, at, how, scale);
#pragma unroll
  for (int e = 0; e < N; ++e) scale[e] = 1;
}

// Adds up what the teams of the block hold for one pack of columns, and leaves it at `start`.
template <class Norm, class At, class A, int N>
__device__ void store_sums(const Arguments<Norm>& a, const Team& team, const Sums<A>& sums,
                           int64_t start, const At& at, bool vector, A (&d_scale)[N],
                           A (&d_bias)[N], A* shared) {
  if (sums.d_scale) {
    add_teams(team, d_scale, shared);
#pragma unroll
    for (int e = 0; e < N; ++e) d_scale[e] *= a.scale_factor;
    if (team.index == 0) store_columns(sums.d_scale + start, at, vector, d_scale);
  }
  if (Norm::kBias && sums.d_bias) {
    add_teams(team, d_bias, shared);
    if (team.index == 0) store_columns(sums.d_bias + start, at, vector, d_bias);
  }
}

}  // namespace norm_cotangent
}  // namespace syntonic
