"""Golden-ratio building blocks for deep networks, as jax primitives with CUDA kernels."""

from . import _extension as _extension  # loads the kernels, or notes why there are none
from .constants import PHI, PHI_INV
from .lattice import GoldenArray, ResonantTensor
from .lattice._crystallize import crystallize
from .modes import GoldenNormMode, PhiResidualMode
from .ops.golden_batch_norm import golden_batch_norm, golden_batch_norm_inference, output_statistics
from .ops.golden_gelu import golden_gelu
from .ops.golden_layer_norm import golden_layer_norm
from .ops.golden_rms_norm import golden_rms_norm
from .ops.phi_residual import phi_residual, phi_residual_gelu, phi_residual_relu
from .ops.phi_residual_layernorm import phi_residual_layernorm
from .ops.phi_residual_rmsnorm import phi_residual_rmsnorm
from .ops.residual_component_norm import residual_component_norm
from .ops.syntonic_cross_entropy import syntonic_cross_entropy
from .ops.syntonic_softmax import syntonic_log_softmax, syntonic_softmax

__all__ = [
    "PHI",
    "PHI_INV",
    "GoldenArray",
    "GoldenNormMode",
    "PhiResidualMode",
    "ResonantTensor",
    "crystallize",
    "golden_batch_norm",
    "golden_batch_norm_inference",
    "golden_gelu",
    "golden_layer_norm",
    "golden_rms_norm",
    "output_statistics",
    "phi_residual",
    "phi_residual_gelu",
    "phi_residual_layernorm",
    "phi_residual_relu",
    "phi_residual_rmsnorm",
    "residual_component_norm",
    "syntonic_cross_entropy",
    "syntonic_log_softmax",
    "syntonic_softmax",
]
__version__ = "0.1.0"
