"""The softmax layers of Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
import softmax_layers
from attention_contract import AttentionContract
from layer_contract import Layer
from softmax_layer_contract import ClassifierContract, SoftmaxContract
from softmax_layers import FEATURES, HEADS, POSITIONS


class TestSyntonicSoftmax(SoftmaxContract):
    keyed = False

    build = staticmethod(softmax_layers.haiku_softmax)

    def empty(self, layer, call):
        return {}

    def test_the_parameter_has_the_dtype_of_the_data(self, rng):
        x = self.data(rng, "bfloat16")
        (norms,) = jax.tree.leaves(self.build(x).init())
        assert norms.dtype == jnp.bfloat16


class TestSyntonicClassifier(ClassifierContract):
    dense = ("['w']", "['b']")

    build = staticmethod(softmax_layers.haiku_classifier)


class TestSyntonicAttention(AttentionContract):
    build = staticmethod(softmax_layers.haiku_attention)

    def theirs(self, x):
        init = hk.initializers.TruncatedNormal(0.3)

        @hk.transform
        def f(x, mask):
            return hk.MultiHeadAttention(HEADS, FEATURES // HEADS, w_init=init)(x, x, x, mask)

        return Layer(
            lambda: f.init(jax.random.key(0), x, None),
            lambda parameters, x, mask: f.apply(parameters, None, x, mask),
        )

    def path(self, **options):
        return softmax_layers.haiku_path(FEATURES // HEADS, **options)

    def project(self, parameters, x):
        def dense(name, x):
            values = parameters[f"multi_head_attention/{name}"]
            return jnp.dot(x, values["w"]) + values["b"]

        def heads(name):
            y = dense(name, x)
            return y.reshape(*y.shape[:-1], HEADS, FEATURES // HEADS)

        def after(y):
            return dense("linear", y.reshape(*y.shape[:-2], FEATURES))

        return heads("query"), heads("key"), heads("value"), after

    def test_size_of_the_model(self, rng, x):
        layer = self.build(x, model_size=5)
        assert layer.apply(layer.init(), x).shape == (2, POSITIONS, 5)
        with pytest.raises(ValueError, match=r"SyntonicAttention: mode must be one of"):
            self.path(mode="golden")
