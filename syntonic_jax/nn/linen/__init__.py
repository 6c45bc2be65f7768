"""Layers for Flax Linen."""

from .norm import GoldenBatchNorm, GoldenLayerNorm
from .residual import PhiResidual, PhiResidualLayerNorm
from .softmax import SyntonicAttention, SyntonicClassifier, SyntonicSoftmax

__all__ = [
    "GoldenBatchNorm",
    "GoldenLayerNorm",
    "PhiResidual",
    "PhiResidualLayerNorm",
    "SyntonicAttention",
    "SyntonicClassifier",
    "SyntonicSoftmax",
]
