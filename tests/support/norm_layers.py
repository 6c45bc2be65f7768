"""How a normalisation layer of each framework is built in tests: ours, or "theirs" for comparison.

Arguments are named as in Flax. `BATCH_NORMS` and `LAYER_NORMS` have a function for each framework:
`(theirs, x, **options) -> Norm` for arrays like x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import numpy as np
from flax import linen, nnx

import syntonic_jax.nn

KEY = jax.random.key(0)


class Norm(NamedTuple):
    init: Callable[[], tuple[Any, Any]]  # parameters and statistics
    # (parameters, statistics, x, train=True, mask=None) -> y, statistics
    apply: Callable[..., tuple[jax.Array, Any]]


def _layer(module, ours, name, theirs, options):
    """The class, and the options with Flax's own variance made the two-pass one."""
    if theirs:
        return getattr(module, name), {"use_fast_variance": False, **options}
    return getattr(ours, f"Golden{name}"), options


def _width(x, axes):
    return int(np.prod([x.shape[a] for a in np.atleast_1d(axes)]))


def nnx_batch_norm(theirs, x, **options) -> Norm:
    layer, options = _layer(nnx, syntonic_jax.nn.nnx, "BatchNorm", theirs, options)
    made = layer(_width(x, options.get("axis", -1)), rngs=nnx.Rngs(0), **options)
    graph, *variables = nnx.split(made, nnx.Param, nnx.BatchStat)

    def apply(parameters, statistics, x, train=True, mask=None):
        # merge takes over the variables themselves, and the layer updates them.
        statistics = jax.tree.map(lambda leaf: leaf, statistics)
        layer = nnx.merge(graph, parameters, statistics)
        y = layer(x, use_running_average=not train, mask=mask)
        return y, nnx.state(layer, nnx.BatchStat)

    return Norm(lambda: tuple(variables), apply)


def nnx_layer_norm(theirs, x, **options) -> Norm:
    layer, options = _layer(nnx, syntonic_jax.nn.nnx, "LayerNorm", theirs, options)
    made = layer(_width(x, options.get("feature_axes", -1)), rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(made)

    def apply(parameters, statistics, x, train=True, mask=None):
        return nnx.merge(graph, parameters)(x, mask=mask), statistics

    return Norm(lambda: (state, {}), apply)


def split(variables):
    return variables.get("params", {}), variables.get("batch_stats", {})


def linen_batch_norm(theirs, x, **options) -> Norm:
    layer, options = _layer(linen, syntonic_jax.nn.linen, "BatchNorm", theirs, options)
    made = layer(**options)

    def apply(parameters, statistics, x, train=True, mask=None):
        y, new = made.apply(
            {"params": parameters, "batch_stats": statistics},
            x,
            use_running_average=not train,
            mask=mask,
            mutable=["batch_stats"],
        )
        return y, new["batch_stats"]

    return Norm(lambda: split(made.init(KEY, x, use_running_average=False)), apply)


def linen_layer_norm(theirs, x, **options) -> Norm:
    layer, options = _layer(linen, syntonic_jax.nn.linen, "LayerNorm", theirs, options)
    made = layer(**options)

    def apply(parameters, statistics, x, train=True, mask=None):
        return made.apply({"params": parameters}, x, mask=mask), statistics

    return Norm(lambda: split(made.init(KEY, x)), apply)


# What Flax calls otherwise than Haiku.
WORDS = {
    "use_scale": "create_scale",
    "use_bias": "create_offset",
    "bias_init": "offset_init",
    "epsilon": "eps",
    "momentum": "decay_rate",
    "axis_name": "cross_replica_axis",
    "axis_index_groups": "cross_replica_axis_index_groups",
    "reduction_axes": "axis",
    "feature_axes": "param_axis",
}
CREATE = {"create_scale": True, "create_offset": True, "name": "norm"}


def in_words(options):
    """The options in the words of Haiku, and what its norms want to be told."""
    return {**CREATE, **{WORDS.get(name, name): value for name, value in options.items()}}


def haiku_batch_norm(theirs, x, **options) -> Norm:
    options = {"decay_rate": 0.9, **in_words(options)}
    layer = hk.BatchNorm if theirs else syntonic_jax.nn.haiku.GoldenBatchNorm
    function = hk.transform_with_state(lambda x, train, **call: layer(**options)(x, train, **call))

    def apply(parameters, statistics, x, train=True, **call):
        return function.apply(parameters, statistics, None, x, train, **call)

    return Norm(lambda: function.init(KEY, x, True), apply)


def haiku_layer_norm(theirs, x, **options) -> Norm:
    options = {"axis": -1, "param_axis": -1, **in_words(options)}
    layer = hk.LayerNorm if theirs else syntonic_jax.nn.haiku.GoldenLayerNorm
    function = hk.transform(lambda x, **call: layer(**options)(x, **call))

    def apply(parameters, statistics, x, train=True, **call):
        return function.apply(parameters, None, x, **call), statistics

    return Norm(lambda: (function.init(KEY, x), {}), apply)


BATCH_NORMS = {"nnx": nnx_batch_norm, "linen": linen_batch_norm, "haiku": haiku_batch_norm}
LAYER_NORMS = {"nnx": nnx_layer_norm, "linen": linen_layer_norm, "haiku": haiku_layer_norm}
