// What the handlers of the softmax operations read alike: the parts of the logits.
#pragma once

#include "ops/syntonic_softmax.h"
#include "targets.h"

namespace syntonic {

// The shape of x: [..., width], or with `planes` [..., width, inner], in as many groups as the
// parameters have rows.
inline Planes planes_of(Call& call, const Array& x, bool planes, const Array& bias,
                        const Array& scale) {
  constexpr int64_t kMost = int64_t{1} << 30;  // rows are indexed by int
  constexpr Planes kNone = {1, 0, 1, 1};
  const size_t least_rank = 1 + planes + SYNTONIC_SPARE_ELEMENTS, rank = x.dims.size();
  call.require(rank >= least_rank, x.name, planes ? " must have planes" : " must have rows",
               ", got ", x.dims);
  if (!call.ok()) return kNone;
  const int64_t inner = planes ? x.dims[rank - 1] : 1, width = x.dims[rank - 1 - planes];
  call.require(inner > 0 && width > 0, x.name, " must have rows of at least one element, got ",
               x.dims);
  call.require(width < kMost && inner < kMost, x.name, " has too long rows: ", x.dims);
  if (!call.ok()) return kNone;
  const int64_t total = x.count / (width * inner);
  int64_t groups = 1;
  if (bias.present()) groups = call.rows_of(bias, width);
  if (scale.present()) {
    call.require(!bias.present() || scale.count == groups, "scale must have ", groups,
                 " elements, got ", scale.dims);
    groups = scale.count;
  }
  for (const Array& parameter : {bias, scale}) call.has_dtype(parameter, accumulation(x.dtype));
  call.require(Call::divides(groups, total), "the parameters have ", groups,
               " rows, which do not divide the ", total, " of ", x.name);
  if (!call.ok() || total == 0) return {1, 0, width, inner};
  return {groups, total / groups, width, inner};
}

// The parts of the logits, the first operands of a call. `first` is what the first of them is
// called.
inline SoftmaxLogits read_logits(Call& call, const char* first, bool planes) {
  const Array x = call.operand(first);
  const Array bias = call.optional_operand("bias");
  const Array weights = call.optional_operand("weights");
  const Array scale = weights.present() ? call.operand("scale") : Array{};
  const Array mask =
      call.has_operand("mask") ? call.operand_of(ffi::DataType::PRED, "bool", 1, "mask") : Array{};
  for (const Array& array : {weights, mask}) call.has_shape_of(array, x);
  call.has_dtype(weights, x.dtype);
  return {
      .x = x.data,
      .bias = bias.data,
      .weights = weights.data,
      .scale = scale.data,
      .mask = mask.data,
      .dtype = x.dtype,
      .shape = planes_of(call, x, planes, bias, scale),
  };
}

// Numbers of the rows of these logits, in their accumulation type.
inline void has_rows_of(Call& call, const Array& array, const SoftmaxLogits& logits) {
  if (!array.present()) return;
  call.has_dtype(array, accumulation(logits.dtype));
  call.has_count(array, logits.shape.rows());
}

// An array like x, which need not be here.
inline void has_elements_of(Call& call, const Array& array, const SoftmaxLogits& logits) {
  if (!array.present()) return;
  call.has_dtype(array, logits.dtype);
  call.has_count(array, logits.shape.elements());
}

// How many rows d_bias has: consecutive stretches of the rows of the data.
inline int64_t partials_of(Call& call, const Array& d_bias, const Array& scratch,
                           const SoftmaxLogits& logits, const char* data) {
  const Planes& shape = logits.shape;
  if (!d_bias.present()) return shape.groups;
  call.require(shape.inner == 1, "d_bias has no kernel along an inner axis");
  for (const Array& array : {d_bias, scratch}) call.has_dtype(array, accumulation(logits.dtype));
  return call.partials(d_bias, Array{}, {shape.groups, shape.outer, shape.width}, data);
}

}  // namespace syntonic
