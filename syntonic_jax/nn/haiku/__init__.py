"""Layers for Haiku."""

from .norm import GoldenBatchNorm, GoldenLayerNorm
from .residual import PhiResidual, PhiResidualLayerNorm
from .rms_norm import GoldenRMSNorm, PhiResidualRMSNorm
from .softmax import SyntonicAttention, SyntonicClassifier, SyntonicSoftmax

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
