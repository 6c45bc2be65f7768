"""Layers for Haiku."""

from .attention import SyntonicAttention
from .norm import GoldenBatchNorm, GoldenLayerNorm
from .residual import PhiResidual, PhiResidualLayerNorm
from .rms_norm import GoldenRMSNorm, PhiResidualRMSNorm
from .softmax import SyntonicClassifier, SyntonicSoftmax

__all__ = [
    "GoldenBatchNorm",
    "GoldenLayerNorm",
    "GoldenRMSNorm",
    "PhiResidual",
    "PhiResidualLayerNorm",
    "PhiResidualRMSNorm",
    "SyntonicAttention",
    "SyntonicClassifier",
    "SyntonicSoftmax",
]
