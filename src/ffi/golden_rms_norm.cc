#include "ops/golden_rms_norm.h"

#include "norm_rows.h"

namespace syntonic {
namespace {

constexpr NormOfRows kNorm = {
    .target = "syntonic_golden_rms_norm",
    .cotangent_target = "syntonic_golden_rms_norm_cotangent",
    .residual = false,
    .bias = false,
    .statistics = 1,
    .launch = golden_rms_norm,
    .launch_cotangent = golden_rms_norm_cotangent,
};

XLA_FFI_DEFINE_HANDLER(kRun, NormHandlers<kNorm>::plain, plain_attributes(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, NormHandlers<kNorm>::plain_cotangent,
                       plain_cotangent_attributes(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_golden_rms_norm>, initialize_by_operand());

const Registration kRegistration("golden_rms_norm",
                                 {
                                     {kNorm.target, kRun, kLoad},
                                     {kNorm.cotangent_target, kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
