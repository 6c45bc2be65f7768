#include "ops/golden_layer_norm.h"

#include "targets.h"

namespace syntonic {
namespace {

// Bits of the attribute `operands`.
constexpr int32_t kScale = 1;
constexpr int32_t kBias = 2;

ffi::Error run(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
               double epsilon, double scale_factor, int32_t given, int32_t residuals) {
  Call call("syntonic_golden_layer_norm", operands, results);
  call.finite("epsilon", epsilon);
  call.finite("scale_factor", scale_factor);
  call.require(epsilon >= 0, "attribute epsilon must not be negative, got ", epsilon);
  call.in_range("operands", given, 0, 3);
  call.in_range("residuals", residuals, 0, 1);
  const Array x = call.operand("x");
  const Array scale = call.operand_if(given & kScale, "scale");
  const Array bias = call.operand_if(given & kBias, "bias");
  const Array y = call.result("y");
  const Array statistics = call.result_if(residuals, "statistics");
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

// Bits of the attribute `results` of the cotangent.
constexpr int32_t kDX = 1;
constexpr int32_t kDScale = 2;
constexpr int32_t kDBias = 4;

ffi::Error run_cotangent(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                         double scale_factor, int32_t given, int32_t wanted) {
  Call call("syntonic_golden_layer_norm_cotangent", operands, results);
  call.finite("scale_factor", scale_factor);
  call.in_range("operands", given, 0, 1);
  call.in_range("results", wanted, 1, 7);
  const Array x = call.operand("x");
  const Array statistics = call.operand("statistics");
  const Array scale = call.operand_if(given & kScale, "scale");
  const Array ct_y = call.operand("ct_y");
  const Array d_x = call.result_if(wanted & kDX, "d_x");
  const Array d_scale = call.result_if(wanted & kDScale, "d_scale");
  const Array d_bias = call.result_if(wanted & kDBias, "d_bias");
  const Array scratch = call.result_if(wanted & (kDScale | kDBias), "scratch");
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

XLA_FFI_DEFINE_HANDLER(kRun, run,
                       execute()
                           .Attr<double>("epsilon")
                           .Attr<double>("scale_factor")
                           .Attr<int32_t>("operands")
                           .Attr<int32_t>("residuals"),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(
    kRunCotangent, run_cotangent,
    execute().Attr<double>("scale_factor").Attr<int32_t>("operands").Attr<int32_t>("results"),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_golden_layer_norm>, initialize_by_operand());

const Registration kRegistration("golden_layer_norm",
                                 {
                                     {"syntonic_golden_layer_norm", kRun, kLoad},
                                     {"syntonic_golden_layer_norm_cotangent", kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
