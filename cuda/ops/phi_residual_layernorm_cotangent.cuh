// The arithmetic of the cotangent of phi_residual_layernorm on one pack, shared by its kernels.
#pragma once

#include "engine/rows_ring.cuh"
#include "ops/phi_residual_layernorm.h"
#include "ops/row_statistics.cuh"

namespace syntonic {
namespace layernorm_cotangent {

template <class T>
struct Arguments {
  using A = Acc<T>;

  Arguments(const PhiResidualLayernormCotangent& call, const RowPlan& plan)
      : z(static_cast<const T*>(call.z)),
        statistics(static_cast<const RowStatistics<A>*>(call.statistics)),
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
  const RowStatistics<A>* statistics;
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

template <class T>
__device__ void normalise(Acc<T> (&x)[kVector<T>], const Normaliser<T>& normal) {
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) x[e] = normal(x[e]);
}

// What a pack of a row adds to the sums along the row.
template <class A, int N>
__device__ void add_products(SumPair<A>& sums, const A (&xhat)[N], const A (&ct)[N],
                             const A (&scale)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const A w = ct[e] * scale[e];
    sums.first += w;
    sums.second += w * xhat[e];
  }
}

// What of a row's gradient does not depend on ct_y but by its means: mean(w) + xhat * mean(w *
// xhat). Beside results of 16 bits one multiply-add does: its second mean is the smaller, the less
// x varies.
template <class T>
class Across {
 public:
  using A = Acc<T>;
  static constexpr bool kOne = sizeof(T) == 2;

  __device__ Across(const Normaliser<T>& normal, const SumPair<A>& means)
      : normal_(normal), means_(means) {
    if constexpr (kOne) {
      by_ = means.second * normal.slope();
      at_zero_ = fma(means.second, normal.offset(), means.first);
    }
  }
  __device__ A operator()(A x) const {
    if constexpr (kOne) return fma(x, by_, at_zero_);
    return fma(normal_(x), means_.second, means_.first);
  }

 private:
  const Normaliser<T>& normal_;
  SumPair<A> means_;
  A by_ = 0;
  A at_zero_ = 0;
};

// dz = rstd * (w - mean(w) - xhat * mean(w * xhat)) + ct_z for elements x of z, where scale_factor
// has been moved out of w and its means into `rstd`.
template <class T, class At>
__device__ void store_gradients(const Arguments<T>& a, int64_t start, const At& at, bool vector,
                                Acc<T> rstd, const Acc<T> (&x)[kVector<T>],
                                const Acc<T> (&ct)[kVector<T>], const Acc<T> (&scale)[kVector<T>],
                                const Packed<T, kVector<T>>& ct_z, const Across<T>& across) {
  constexpr int N = kVector<T>;
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
template <class T, class At, class How>
__device__ void load_scale(const Arguments<T>& a, int64_t group_start, const At& at, How how,
                           Acc<T> (&scale)[kVector<T>]) {
  if (a.scale) return load_parameter(a.scale + group_start, at, how, scale);
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) scale[e] = Acc<T>(1);
}

// Adds up what the teams of the block hold for one pack of columns, and leaves it at `start`.
template <class T, class At>
__device__ void store_sums(const Arguments<T>& a, const Team& team, const Sums<Acc<T>>& sums,
                           int64_t start, const At& at, bool vector, Acc<T> (&d_scale)[kVector<T>],
                           Acc<T> (&d_bias)[kVector<T>], Acc<T>* shared) {
  if (sums.d_scale) {
    add_teams(team, d_scale, shared);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) d_scale[e] *= a.scale_factor;
    if (team.index == 0) store_columns(sums.d_scale + start, at, vector, d_scale);
  }
  if (sums.d_bias) {
    add_teams(team, d_bias, shared);
    if (team.index == 0) store_columns(sums.d_bias + start, at, vector, d_bias);
  }
}

}  // namespace layernorm_cotangent
}  // namespace syntonic
