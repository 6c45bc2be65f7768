#include "ops/golden_batch_norm.h"

#include "targets.h"

namespace syntonic {
namespace {

// x is [batch..., rows..., channels, inner], every result [batch..., channels]; where none is of
// channels, every parameter is.
Channels channels_of(Call& call, const Array& x, const Array& result) {
  const int64_t inner = call.width_of(x);
  const int64_t count = call.width_of(result);
  const size_t rank = x.dims.size();
  call.require(rank >= 2 && x.dims[rank - 2] == count, x.name, " must have ", count,
               " channels before its last axis, got ", x.dims);
  const int64_t partials = result.count / count;
  const int64_t rows = x.count / (count * inner);
  call.require(Call::divides(partials, rows), result.name, " has ", partials,
               " rows, which do not divide the ", rows, " of ", x.name);
  if (partials == 0 || !call.ok()) return {1, 0, 1, 1};
  return {partials, rows / partials, count, inner};
}

// In how many groups `partials` rows of channels come, as many as the parameter has rows.
int64_t groups_of(Call& call, const Array& parameter, const Channels& channels,
                  const Array& result) {
  const int64_t groups = call.rows_of(parameter, channels.count);
  call.require(groups > 0 && Call::divides(groups, channels.partials), parameter.name, " has ",
               groups, " rows, of which the ", channels.partials, " rows of ", result.name,
               " are no multiple");
  return groups;
}

ffi::Error run_moments(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                       Names operand_names, Names result_names, double epsilon,
                       double scale_factor) {
  Call call("syntonic_golden_batch_norm_moments", operands, results, operand_names, result_names);
  call.finite("epsilon", epsilon);
  call.finite("scale_factor", scale_factor);
  call.require(epsilon >= 0, "attribute epsilon must not be negative, got ", epsilon);
  const Array x = call.operand("x");
  const Array scale = call.optional_operand("scale");
  const Array bias = call.optional_operand("bias");
  const Array mean = call.result("mean");
  const Array low = call.result("low");
  const Array var = call.result("var");
  const Array slope = call.result("slope");
  const Array shift = call.result("shift");
  const Array scratch = call.result("scratch");
  for (const Array& array : {scale, bias, mean, low, var, slope, shift, scratch}) {
    call.has_dtype(array, accumulation(x.dtype));
  }
  for (const Array& array : {low, var, slope, shift}) call.has_shape_of(array, mean);
  const Channels channels = channels_of(call, x, mean);
  int64_t groups = 1;
  for (const Array& array : {scale, bias}) {
    if (array.present()) groups = groups_of(call, array, channels, mean);
  }
  if (scale.present()) call.has_shape_of(bias, scale);
  call.require(scratch.count >= kMomentsScratch * channels.results(), "scratch must have at least ",
               kMomentsScratch * channels.results(), " elements, got ", scratch.dims);
  const GoldenBatchNormMoments arguments{
      .x = x.data,
      .scale = scale.data,
      .bias = bias.data,
      .mean = mean.data,
      .low = low.data,
      .var = var.data,
      .slope = slope.data,
      .shift = shift.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .dtype = x.dtype,
      .channels = channels,
      .groups = groups,
      .epsilon = epsilon,
      .scale_factor = scale_factor,
  };
  return call.launch(stream, channels.elements(), {mean, low, var, slope, shift},
                     [&] { return golden_batch_norm_moments(stream, arguments); });
}

ffi::Error run_sums(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    Names operand_names, Names result_names) {
  Call call("syntonic_golden_batch_norm_sums", operands, results, operand_names, result_names);
  const Array x = call.operand("x");
  const Array mean = call.operand("mean");
  const Array low = call.operand("low");
  const Array ct = call.operand("ct");
  const Array sum = call.result("sum");
  const Array product = call.result("product");
  const Array scratch = call.result("scratch");
  for (const Array& array : {mean, low, sum, product, scratch}) {
    call.has_dtype(array, accumulation(x.dtype));
  }
  if (ct.dtype != x.dtype) {  // which it may be, too
    call.has_dtype(ct, accumulation(x.dtype));
  }
  call.has_shape_of(ct, x);
  call.has_shape_of(product, sum);
  call.has_shape_of(low, mean);
  const Channels channels = channels_of(call, x, sum);
  const int64_t groups = groups_of(call, mean, channels, sum);
  call.require(scratch.count >= kSumsScratch * channels.results(), "scratch must have at least ",
               kSumsScratch * channels.results(), " elements, got ", scratch.dims);
  const GoldenBatchNormSums arguments{
      .x = x.data,
      .mean = mean.data,
      .low = low.data,
      .ct = ct.data,
      .sum = sum.data,
      .product = product.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .dtype = x.dtype,
      .ct_dtype = ct.dtype,
      .channels = channels,
      .groups = groups,
  };
  return call.launch(stream, channels.elements(), {sum, product},
                     [&] { return golden_batch_norm_sums(stream, arguments); });
}

ffi::Error run_normalise(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names) {
  Call call("syntonic_golden_batch_norm_normalise", operands, results, operand_names, result_names);
  const Array x = call.operand("x");
  const Array mean = call.operand("mean");
  const Array slope = call.operand("slope");
  const Array shift = call.operand("shift");
  const Array y = call.result("y");
  for (const Array& array : {mean, slope, shift}) call.has_dtype(array, accumulation(x.dtype));
  for (const Array& array : {slope, shift}) call.has_shape_of(array, mean);
  call.has_shape_of(y, x);
  const GoldenBatchNormNormalise arguments{
      .x = x.data,
      .mean = mean.data,
      .slope = slope.data,
      .shift = shift.data,
      .y = y.data,
      .dtype = x.dtype,
      .y_dtype = y.dtype,
      .channels = channels_of(call, x, mean),
  };
  return call.launch(stream, arguments.channels.elements(), {},
                     [&] { return golden_batch_norm_normalise(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRunMoments, run_moments,
                       execute().Attr<double>("epsilon").Attr<double>("scale_factor"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunSums, run_sums, execute(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunNormalise, run_normalise, execute(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_golden_batch_norm>, initialize_by_operand());
XLA_FFI_DEFINE_HANDLER(kLoadNormalise, load_for_operand<load_golden_batch_norm_normalise>,
                       initialize_by_operand());

const Registration kRegistration("golden_batch_norm",
                                 {
                                     {"syntonic_golden_batch_norm_moments", kRunMoments, kLoad},
                                     {"syntonic_golden_batch_norm_sums", kRunSums, kLoad},
                                     {"syntonic_golden_batch_norm_normalise", kRunNormalise,
                                      kLoadNormalise},
                                 });

}  // namespace

}  // namespace syntonic
