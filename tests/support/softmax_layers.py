"""How a softmax layer of each framework is built in tests.

Arguments are named as in Flax. `SOFTMAXES`, `CLASSIFIERS` and `ATTENTIONS` have a function for each
framework, `(x, **options) -> Layer` for arrays like x; `call` has what else its first call takes.
"""

import haiku as hk
import jax
from flax import nnx
from layer_contract import Layer

from syntonic_jax.nn import haiku, linen
from syntonic_jax.nn import nnx as ours_nnx

HEADS, FEATURES, POSITIONS = 3, 12, 7


def nnx_layer(made, method="__call__") -> Layer:
    graph, state = nnx.split(made)
    return Layer(
        lambda: state,
        lambda state, *args, **kwargs: getattr(nnx.merge(graph, state), method)(*args, **kwargs),
    )


def linen_layer(layer, x, call=None, method="__call__") -> Layer:
    def apply(variables, *args, **kwargs):
        return layer.apply(variables, *args, method=method, **kwargs)

    return Layer(lambda: layer.init(jax.random.key(0), x, **(call or {})), apply)


def haiku_layer(make, x, call=None, method="__call__") -> Layer:
    @hk.transform
    def f(*args, **kwargs):
        return getattr(make(), method)(*args, **kwargs)

    @hk.transform
    def values(*args, **kwargs):
        return make()(*args, **kwargs)

    return Layer(
        lambda: values.init(jax.random.key(0), x, **(call or {})),
        lambda parameters, *args, **kwargs: f.apply(parameters, None, *args, **kwargs),
    )


def nnx_softmax(x, call=None, **options) -> Layer:
    options = {"num_features": x.shape[-1], "rngs": nnx.Rngs(0), **options}
    return nnx_layer(ours_nnx.SyntonicSoftmax(**options))


def linen_softmax(x, call=None, **options) -> Layer:
    return linen_layer(linen.SyntonicSoftmax(**options), x, call)


def haiku_softmax(x, call=None, **options) -> Layer:
    return haiku_layer(lambda: haiku.SyntonicSoftmax(**options), x, call)


def nnx_classifier(x, method="__call__", **options) -> Layer:
    made = ours_nnx.SyntonicClassifier(x.shape[-1], rngs=nnx.Rngs(0), **options)
    return nnx_layer(made, method)


def linen_classifier(x, method="__call__", **options) -> Layer:
    return linen_layer(linen.SyntonicClassifier(**options), x, method=method)


def haiku_classifier(x, method="__call__", **options) -> Layer:
    return haiku_layer(lambda: haiku.SyntonicClassifier(**options), x, method=method)


def nnx_attention(x, call=None, heads=HEADS, **options) -> Layer:
    options = {"num_positions": x.shape[-2], "rngs": nnx.Rngs(0), **options}
    return nnx_layer(ours_nnx.SyntonicAttention(heads, x.shape[-1], **options))


def linen_attention(x, call=None, heads=HEADS, **options) -> Layer:
    return linen_layer(linen.SyntonicAttention(heads, **options), x, call)


def haiku_attention(x, call=None, heads=HEADS, **options) -> Layer:
    options = {"name": "multi_head_attention", **options}
    size = options.pop("qkv_features", x.shape[-1]) // heads
    return haiku_layer(lambda: haiku.SyntonicAttention(heads, size, **options), x, call)


def nnx_path(size, **options) -> str:
    return ours_nnx.SyntonicAttention(
        *(HEADS, HEADS * size, POSITIONS), rngs=nnx.Rngs(0), **options
    ).path


def linen_path(size, **options) -> str:
    return linen.SyntonicAttention(HEADS, POSITIONS, qkv_features=HEADS * size, **options).path


def haiku_path(size, **options) -> str:
    def layer():
        return haiku.SyntonicAttention(HEADS, size, POSITIONS, **options).path

    return hk.testing.transform_and_run(layer)()


SOFTMAXES = {"nnx": nnx_softmax, "linen": linen_softmax, "haiku": haiku_softmax}
CLASSIFIERS = {"nnx": nnx_classifier, "linen": linen_classifier, "haiku": haiku_classifier}
ATTENTIONS = {"nnx": nnx_attention, "linen": linen_attention, "haiku": haiku_attention}
# (size of a head, **options) -> what the layer says of how it adds the weights
PATHS = {"nnx": nnx_path, "linen": linen_path, "haiku": haiku_path}
