"""The softmax layers of Flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import softmax_layers
from attention_contract import AttentionContract
from flax import nnx
from layer_contract import Layer, normal
from softmax_layer_contract import CLASSES, ClassifierContract, SoftmaxContract
from softmax_layers import FEATURES, HEADS, POSITIONS

from syntonic_jax.nn.nnx import SyntonicAttention, SyntonicClassifier, SyntonicSoftmax


class TestSyntonicSoftmax(SoftmaxContract):
    build = staticmethod(softmax_layers.nnx_softmax)

    def empty(self, layer, call):
        return layer.init()

    def test_what_learned_mode_needs(self):
        with pytest.raises(ValueError, match="SyntonicSoftmax: num_features must be given"):
            SyntonicSoftmax(rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="SyntonicSoftmax: rngs must be given"):
            SyntonicSoftmax("learned", 3)
        assert SyntonicSoftmax("identity")(jnp.zeros(2)).tolist() == [0.5, 0.5]

    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
    def test_dtype_arguments(self, rng, dtype):
        softmax = SyntonicSoftmax(
            "learned", CLASSES, dtype=dtype, param_dtype="float16", rngs=nnx.Rngs(0)
        )
        assert softmax.mode_norms[...].dtype == jnp.float16
        x = self.data(rng, "bfloat16")
        assert softmax(x).dtype == (dtype or jnp.promote_types("bfloat16", "float16"))


class TestSyntonicClassifier(ClassifierContract):
    dense = ("['kernel']", "['bias']")

    build = staticmethod(softmax_layers.nnx_classifier)

    def test_under_nnx_jit_and_value_and_grad(self, x):
        classifier = SyntonicClassifier(FEATURES, CLASSES, rngs=nnx.Rngs(0))

        @nnx.jit
        def step(classifier, x):
            labels = jnp.zeros(len(x), int)
            return nnx.value_and_grad(lambda c: c.loss(x, labels).mean())(classifier)

        _, slopes = step(classifier, x)
        assert set(nnx.to_flat_state(slopes).paths) == {
            ("dense", "kernel"),
            ("dense", "bias"),
            ("softmax", "mode_norms"),
        }
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(slopes))


class TestSyntonicAttention(AttentionContract):
    build = staticmethod(softmax_layers.nnx_attention)

    def theirs(self, x):
        layer = softmax_layers.nnx_layer(
            nnx.MultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), decode=False, keep_rngs=False)
        )
        return Layer(layer.init, lambda state, x, mask: layer.apply(state, x, mask=mask))

    def path(self, **options):
        return softmax_layers.nnx_path(FEATURES // HEADS, **options)

    def project(self, parameters, x):
        layer = SyntonicAttention(HEADS, FEATURES, mode="identity", rngs=nnx.Rngs(0))
        state = dict(nnx.to_pure_dict(parameters))
        state.pop("mode_norms", None)
        nnx.update(layer, state)
        return layer.query(x), layer.key(x), layer.value(x), layer.out

    def test_initialisers_draw_what_multi_head_attention_draws(self, x):
        ours = jax.tree.leaves(self.build(x, mode="identity").init())
        for a, b in zip(ours, jax.tree.leaves(self.theirs(x).init()), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_what_learned_mode_needs(self):
        with pytest.raises(ValueError, match="SyntonicAttention: num_positions must be given"):
            SyntonicAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))

    def test_features_that_heads_do_not_divide(self, rng):
        with pytest.raises(ValueError, match=r"SyntonicAttention: qkv_features .*got 7"):
            SyntonicAttention(HEADS, 7, POSITIONS, rngs=nnx.Rngs(0))
        attention = SyntonicAttention(
            HEADS, 7, POSITIONS, qkv_features=6, out_features=4, rngs=nnx.Rngs(0)
        )
        assert attention(normal(rng, POSITIONS, 7)).shape == (POSITIONS, 4)
