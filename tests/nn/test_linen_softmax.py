"""The softmax layers of Flax Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import softmax_layers
from attention_contract import AttentionContract
from flax import linen as nn
from layer_contract import Layer, normal
from softmax_layer_contract import CLASSES, ClassifierContract, SoftmaxContract
from softmax_layers import FEATURES, HEADS, POSITIONS

from syntonic_jax.nn.linen import SyntonicAttention, SyntonicClassifier, SyntonicSoftmax


class TestSyntonicSoftmax(SoftmaxContract):
    build = staticmethod(softmax_layers.linen_softmax)

    def empty(self, layer, call):
        return {}

    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
    def test_dtype_arguments(self, rng, dtype):
        x = self.data(rng, "bfloat16")
        softmax = SyntonicSoftmax(dtype=dtype, param_dtype="float16")
        y, variables = softmax.init_with_output(jax.random.key(0), x)
        assert variables["params"]["mode_norms"].dtype == jnp.float16
        assert y.dtype == (dtype or jnp.promote_types("bfloat16", "float16"))


class TestSyntonicClassifier(ClassifierContract):
    dense = ("['kernel']", "['bias']")

    build = staticmethod(softmax_layers.linen_classifier)

    def test_dtype_arguments(self, x):
        classifier = SyntonicClassifier(CLASSES, dtype="bfloat16")
        y, variables = classifier.init_with_output(jax.random.key(0), x)
        assert y.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


class TestSyntonicAttention(AttentionContract):
    build = staticmethod(softmax_layers.linen_attention)

    def theirs(self, x):
        layer = softmax_layers.linen_layer(nn.MultiHeadAttention(HEADS), x)
        return Layer(layer.init, lambda variables, x, mask: layer.apply(variables, x, mask=mask))

    def path(self, **options):
        return softmax_layers.linen_path(FEATURES // HEADS, **options)

    def project(self, parameters, x):
        tree = parameters["params"]

        def heads(name):
            kernel, bias = tree[name]["kernel"], tree[name]["bias"]
            return jnp.einsum("...f,fhd->...hd", x, kernel) + bias

        def after(y):
            return jnp.einsum("...hd,hdf->...f", y, tree["out"]["kernel"]) + tree["out"]["bias"]

        return heads("query"), heads("key"), heads("value"), after

    def test_initialisers_draw_what_multi_head_attention_draws(self, x):
        ours = jax.tree.leaves(self.build(x, mode="identity").init())
        for a, b in zip(ours, jax.tree.leaves(self.theirs(x).init()), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_features_that_heads_do_not_divide(self, rng):
        x = normal(rng, POSITIONS, 7)
        with pytest.raises(ValueError, match=r"SyntonicAttention: qkv_features .*got 7"):
            self.build(x).init()
        attention = SyntonicAttention(HEADS, qkv_features=6, out_features=4)
        y, _ = attention.init_with_output(jax.random.key(0), x)
        assert y.shape == (POSITIONS, 4)
