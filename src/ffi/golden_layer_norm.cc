#include "ops/golden_layer_norm.h"

#include "targets.h"

namespace syntonic {
namespace {

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               Names operand_names, Names result_names, double epsilon, double scale_factor) {
  Call call("syntonic_golden_layer_norm", operands, results, operand_names, result_names);
  call.finite("epsilon", epsilon);
  call.finite("scale_factor", scale_factor);
  call.require(epsilon >= 0, "attribute epsilon must not be negative, got ", epsilon);
  const Array x = call.operand("x");
  const Array scale = call.optional_operand("scale");
  const Array bias = call.optional_operand("bias");
  const Array y = call.result("y");
  const Array statistics = call.optional_result("statistics");
  call.has_shape_of(y, x);
  const Rows rows = call.rows(x, {scale, bias});
  call.has_dtype(statistics, accumulation(x.dtype));
  call.has_count(statistics, kRowStatistics * rows.total());
  const GoldenLayerNorm arguments{
      .x = x.data,
      .scale = scale.data,
      .bias = bias.data,
      .y = y.data,
      .statistics = statistics.data,
      .dtype = x.dtype,
      .y_dtype = y.dtype,
      .rows = rows,
      .epsilon = epsilon,
      .scale_factor = scale_factor,
  };
  return call.launch(stream, rows.total(), {},
                     [&] { return golden_layer_norm(stream, arguments); });
}

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         Names operand_names, Names result_names, double scale_factor) {
  Call call("syntonic_golden_layer_norm_cotangent", operands, results, operand_names, result_names);
  call.finite("scale_factor", scale_factor);
  const Array x = call.operand("x");
  const Array statistics = call.operand("statistics");
  const Array scale = call.optional_operand("scale");
  const Array ct_y = call.operand("ct_y");
  const Array d_x = call.optional_result("d_x");
  const Array d_scale = call.optional_result("d_scale");
  const Array d_bias = call.optional_result("d_bias");
  const bool sums = d_scale.present() || d_bias.present();
  const Array scratch = sums ? call.result("scratch") : Array{};
  for (const Array& array : {ct_y, d_x}) call.has_shape_of(array, x);
  call.has_dtype(d_x, x.dtype);
  for (const Array& array : {statistics, d_scale, d_bias, scratch}) {
    call.has_dtype(array, accumulation(x.dtype));
  }
  const Rows rows = call.rows(x, {scale});
  call.has_count(statistics, kRowStatistics * rows.total());
  const int64_t partials = call.partials(d_scale, d_bias, rows, "x");
  const GoldenLayerNormCotangent arguments{
      .x = x.data,
      .statistics = statistics.data,
      .scale = scale.data,
      .ct_y = ct_y.data,
      .d_x = d_x.data,
      .d_scale = d_scale.data,
      .d_bias = d_bias.data,
      .scratch = scratch.data,
      .scratch_size = scratch.count,
      .dtype = x.dtype,
      .y_dtype = ct_y.dtype,
      .rows = rows,
      .partials = partials,
      .scale_factor = scale_factor,
  };
  return call.launch(stream, rows.total(), {d_scale, d_bias},
                     [&] { return golden_layer_norm_cotangent(stream, arguments); });
}

XLA_FFI_DEFINE_HANDLER(kRun, run, execute().Attr<double>("epsilon").Attr<double>("scale_factor"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, run_cotangent, execute().Attr<double>("scale_factor"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_golden_layer_norm>, initialize_by_operand());

const Registration kRegistration("golden_layer_norm",
                                 {
                                     {"syntonic_golden_layer_norm", kRun, kLoad},
                                     {"syntonic_golden_layer_norm_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
