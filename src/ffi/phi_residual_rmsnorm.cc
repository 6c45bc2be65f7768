#include "ops/phi_residual_rmsnorm.h"

#include "norm_rows.h"

namespace syntonic {
namespace {

constexpr NormOfRows kNorm = {
    .target = "syntonic_phi_residual_rmsnorm",
    .cotangent_target = "syntonic_phi_residual_rmsnorm_cotangent",
    .residual = true,
    .bias = false,
    .statistics = 1,
    .launch = phi_residual_rmsnorm,
    .launch_cotangent = phi_residual_rmsnorm_cotangent,
};

XLA_FFI_DEFINE_HANDLER(kRun, NormHandlers<kNorm>::sum, sum_attributes(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRunCotangent, NormHandlers<kNorm>::sum_cotangent,
                       sum_cotangent_attributes(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kLoad, load_for_operand<load_phi_residual_rmsnorm>, initialize_by_operand());

const Registration kRegistration("phi_residual_rmsnorm",
                                 {
                                     {kNorm.target, kRun, kLoad},
                                     {kNorm.cotangent_target, kRunCotangent, kLoad},
                                 });

}  // namespace

}  // namespace syntonic
