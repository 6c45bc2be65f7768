"""The Haiku layers."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from layer_contract import (
    WIDTH,
    Layer,
    LayerNormContract,
    PhiResidualContract,
    by_name,
    normal,
    randomised,
)

from syntonic_jax.nn.haiku import PhiResidual, PhiResidualLayerNorm

# What the contract calls as Flax does, in the words of Haiku.
WORDS = {
    "use_scale": "create_scale",
    "use_bias": "create_offset",
    "bias_init": "offset_init",
    "epsilon": "eps",
}


class TestPhiResidualLayerNorm(LayerNormContract):
    epsilon = 1e-5
    epsilon_is_called = "eps"
    bias = "offset"
    random_init = staticmethod(hk.initializers.RandomNormal())

    def build(self, theirs, arrays, **options):
        options = {WORDS.get(name, name): value for name, value in options.items()}
        options = {"create_scale": True, "create_offset": True, "name": "norm", **options}
        layer = hk.LayerNorm if theirs else PhiResidualLayerNorm
        function = hk.transform(lambda *arrays: layer(axis=-1, **options)(*arrays))
        return Layer(
            lambda: function.init(jax.random.key(0), *arrays),
            lambda parameters, *arrays: function.apply(parameters, None, *arrays),
        )

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_parameters_have_the_dtype_of_the_arrays(self, rng, dtype):
        arrays = self.arrays(rng, dtype)
        norm = self.ours(arrays)
        parameters = norm.init()
        assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(dtype)}
        assert norm.apply(parameters, *arrays).dtype == dtype

    def test_bfloat16_is_rounded_once(self, rng):
        """hk.LayerNorm rounds every step to bfloat16; the layer only y."""
        arrays = self.arrays(rng, "bfloat16")
        norm = self.ours(arrays, return_sum=True)
        parameters = randomised(norm.init(), rng)
        y, z = norm.apply(parameters, *arrays)
        values = by_name(parameters)
        expected = oracles.layernorm(
            oracles.exactly(z),
            values["scale"],
            values["offset"],
            epsilon=self.epsilon,
            acc="float32",
        )
        oracles.assert_close(y, expected)

    def test_parameters_passed_at_call_time(self, rng):
        arrays, scale, offset = self.arrays(rng), normal(rng, WIDTH), normal(rng, WIDTH)
        created = {"norm": {"scale": scale, "offset": offset}}
        norm = self.ours(arrays, use_scale=False, use_bias=False)
        got = norm.apply(norm.init(), *arrays, scale, offset)
        np.testing.assert_array_equal(got, self.ours(arrays).apply(created, *arrays))

    def test_parameters_both_created_and_passed_are_refused(self, rng):
        arrays, vector = self.arrays(rng), normal(rng, WIDTH)
        norm = self.ours(arrays)
        with pytest.raises(ValueError, match="scale passed with create_scale=True"):
            norm.apply(norm.init(), *arrays, vector)
        with pytest.raises(ValueError, match="offset passed with create_offset=True"):
            norm.apply(norm.init(), *arrays, None, vector)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"axis": -2}, "axis must be -1, got -2"),
            ({"axis": slice(1, None)}, "axis must be -1"),
            ({"axis": -1, "param_axis": 1}, "param_axis must be -1, got 1"),
            ({"axis": -1, "use_fast_variance": True}, "use_fast_variance must be False"),
            ({"axis": -1, "create_scale": False, "scale_init": jnp.ones}, "create_scale=False"),
            ({"axis": -1, "create_offset": False, "offset_init": jnp.ones}, "create_offset=False"),
        ],
    )
    def test_options_of_layer_norm_that_cannot_hold_are_refused(self, rng, options, message):
        options = {"create_scale": True, "create_offset": True, **options}
        function = hk.transform(lambda *arrays: PhiResidualLayerNorm(**options)(*arrays))
        with pytest.raises(ValueError, match=message):
            function.init(None, *self.arrays(rng))

    def test_axis_may_be_said_in_any_way(self, rng):
        arrays = self.arrays(rng)
        for axis in (-1, (-1,), [-1]):
            function = hk.transform(
                lambda *xs, axis=axis: PhiResidualLayerNorm(axis, True, True, param_axis=axis)(*xs)
            )
            assert function.init(None, *arrays)

    def test_another_width_is_refused(self, rng):
        wide = self.ours(tuple(normal(rng, 2, WIDTH + 1) for _ in range(2)))
        with pytest.raises(ValueError, match=r"(?s)scale.*25.*24"):
            wide.apply(wide.init(), *self.arrays(rng))


class TestPhiResidual(PhiResidualContract):
    def build(self, x, mode="phi", **options):
        layer = hk.transform(lambda x: PhiResidual(hk.Linear(WIDTH, name="l"), mode, **options)(x))
        block = hk.transform(lambda x: hk.Linear(WIDTH, name="l")(x))
        return (
            Layer(
                lambda: layer.init(jax.random.key(0), x),
                lambda parameters, x: layer.apply(parameters, None, x),
            ),
            lambda parameters, x: block.apply(parameters, None, x),
        )

    def around(self, function, x, *args, options=None, **kwargs):
        layer = hk.transform(lambda: PhiResidual(function, **(options or {}))(x, *args, **kwargs))
        return layer.apply({}, None)


def test_layers_in_a_scanned_stack(rng):
    """hk.layer_stack scans one block over parameters with a leading axis."""
    depth, x = 3, normal(rng, 4, WIDTH)

    def block(x):
        y, z = PhiResidualLayerNorm(-1, True, True, return_sum=True)(x, hk.Linear(WIDTH)(x))
        return PhiResidual(jnp.sin)(y) + z

    function = hk.transform(hk.layer_stack(depth)(block))
    parameters = function.init(jax.random.key(0), x)
    assert all(leaf.shape[0] == depth for leaf in jax.tree.leaves(parameters))
    gradients = jax.jit(jax.grad(lambda p: function.apply(p, None, x).sum()))(parameters)
    assert jax.tree.structure(gradients) == jax.tree.structure(parameters)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
