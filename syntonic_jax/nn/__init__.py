"""Layers for Flax NNX, Flax Linen and Haiku.

The modules are ``syntonic_jax.nn.nnx``, ``syntonic_jax.nn.linen`` and ``syntonic_jax.nn.haiku``.
Each is imported when it is first used, so that none of the frameworks is a dependency; where the
framework is missing, that import raises an ``ImportError`` naming the extra to install.

Every module has the same nine layers. ``PhiResidual`` adds a block to its own input;
``PhiResidualLayerNorm`` and ``PhiResidualRMSNorm`` are its framework's ``LayerNorm`` and
``RMSNorm`` of such a sum. ``GoldenBatchNorm``, ``GoldenLayerNorm`` and ``GoldenRMSNorm`` are its
``BatchNorm``, ``LayerNorm`` and ``RMSNorm``, argument for argument, with a target variance; with
variance; with
``target_variance='standard'`` they compute what theirs do. Names, shapes, dtypes
and initialisers of parameters and statistics, default epsilons and result dtypes are those of the
framework, so checkpoints go both ways. Where the framework names a layer after its class, the
layer that takes the place of another is given the other's name: ``name='BatchNorm_0'`` in Linen,
``name='batch_norm'`` in Haiku.

``SyntonicSoftmax`` is a softmax whose classes have weights: learned, with a parameter
``mode_norms``, provided in the call, or none. ``SyntonicClassifier`` is a dense layer before it,
with a cross entropy beside the probabilities. ``SyntonicAttention`` is the framework's multi-head
attention, with its parameters, whose key positions have such weights.

The layers hold parameters and settings; what is computed, and in which precision, is said at
:func:`syntonic_jax.phi_residual`, :func:`syntonic_jax.phi_residual_layernorm`,
:func:`syntonic_jax.phi_residual_rmsnorm`, :func:`syntonic_jax.golden_batch_norm`,
:func:`syntonic_jax.golden_layer_norm`, :func:`syntonic_jax.golden_rms_norm`,
:func:`syntonic_jax.syntonic_softmax` and :func:`syntonic_jax.syntonic_cross_entropy`.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> import syntonic_jax.nn
>>> norm = syntonic_jax.nn.nnx.PhiResidualLayerNorm(3, rngs=nnx.Rngs(0))
>>> norm(jnp.zeros((2, 3)), jnp.ones((2, 3))).shape
(2, 3)
"""

import importlib
from types import ModuleType

__all__ = ["haiku", "linen", "nnx"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
