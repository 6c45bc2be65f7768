"""Golden-ratio building blocks for deep networks, as jax primitives with CUDA kernels."""

from . import _extension as _extension  # loads the kernels, or notes why there are none
from .constants import PHI, PHI_INV
from .modes import PhiResidualMode
from .ops.golden_gelu import golden_gelu
from .ops.phi_residual import phi_residual, phi_residual_gelu, phi_residual_relu
from .ops.phi_residual_layernorm import phi_residual_layernorm
from .ops.residual_component_norm import residual_component_norm

__all__ = [
    "PHI",
    "PHI_INV",
    "PhiResidualMode",
    "golden_gelu",
    "phi_residual",
    "phi_residual_gelu",
    "phi_residual_layernorm",
    "phi_residual_relu",
    "residual_component_norm",
]
__version__ = "0.1.0"
