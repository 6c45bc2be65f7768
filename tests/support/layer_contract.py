"""What the layers of every framework must show, written once.

`tests/nn/test_<framework>.py` subclasses the two contracts and says how a layer is built there:
`build` returns how its parameters are made and how it is applied to them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from syntonic_jax import PHI_INV, PhiResidualMode, phi_residual

MODES = [mode.value for mode in PhiResidualMode]
WIDTH = 24


def normal(rng, *shape, dtype="float32", spread=1.0):
    return jnp.asarray(rng.normal(size=shape) * spread, dtype)


def by_name(tree) -> dict[str, jax.Array]:
    """The leaves of a tree by the name they go by: scale, and bias or offset."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = ("scale", "bias", "offset")
    return {next(n for n in names if n in jax.tree_util.keystr(p)): leaf for p, leaf in leaves}


def described(tree):
    """Paths, shapes, dtypes and values: what a checkpoint holds."""
    return [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), np.asarray(leaf).tolist())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def randomised(tree, rng):
    """The same tree with other numbers, as training would leave it."""
    return jax.tree.map(lambda leaf: normal(rng, *leaf.shape, dtype=leaf.dtype), tree)


class Layer(NamedTuple):
    init: Callable[[], Any]  # the tree of parameters
    apply: Callable[..., Any]  # (parameters, *arrays) -> what the layer returns


class LayerNormContract:
    """PhiResidualLayerNorm beside the framework's own LayerNorm ("theirs")."""

    epsilon: float  # the framework's default
    bias = "bias"  # what the framework calls it
    epsilon_is_called = "epsilon"
    random_init: Any = staticmethod(jax.nn.initializers.normal(1.0))

    def build(self, theirs: bool, arrays, **options) -> Layer:
        """PhiResidualLayerNorm, or the framework's LayerNorm, for arrays like these."""
        raise NotImplementedError

    def ours(self, arrays, **options):
        return self.build(False, arrays, **options)

    def theirs(self, z, **options):
        return self.build(True, (z,), **options)

    def arrays(self, rng, dtype="float32", spread=1.0):
        return tuple(normal(rng, 2, 3, WIDTH, dtype=dtype, spread=spread) for _ in range(2))

    @pytest.mark.parametrize("use_scale", [True, False])
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_parameters_are_the_frameworks(self, rng, use_scale, use_bias):
        arrays = self.arrays(rng)
        options = {"use_scale": use_scale, "use_bias": use_bias}
        ours = self.ours(arrays, **options).init()
        theirs = self.theirs(arrays[0], **options).init()
        assert described(ours) == described(theirs)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert sorted(by_name(ours)) == sorted(["scale"] * use_scale + [self.bias] * use_bias)

    def test_initialisers_draw_what_the_frameworks_draw(self, rng):
        arrays, init = self.arrays(rng), self.random_init
        ours = self.ours(arrays, scale_init=init, bias_init=init).init()
        theirs = self.theirs(arrays[0], scale_init=init, bias_init=init).init()
        assert described(ours) == described(theirs)
        values = by_name(ours)
        assert not np.array_equal(values["scale"], values[self.bias])

    @pytest.mark.parametrize("mode", MODES)
    def test_output_is_the_frameworks_of_the_sum(self, rng, mode, implementation):
        """A checkpoint of the framework's layer, loaded into ours.

        Rows vary by 1e-3, so that an epsilon that is not the framework's default would be seen;
        each of the two outputs may be off by the slack of the oracle and by its own rounding.
        """
        arrays = self.arrays(rng, spread=1e-3)
        theirs = self.theirs(arrays[0])
        parameters = randomised(theirs.init(), rng)
        options = {"mode": mode, "return_sum": True, "implementation": implementation}
        y, z = self.ours(arrays, **options).apply(parameters, *arrays)

        oracles.assert_close(z, oracles.residual_sum(*arrays, mode, "float32"), "z")
        values = by_name(parameters)
        expected = oracles.layernorm(
            oracles.exactly(z),
            values["scale"],
            values[self.bias],
            epsilon=self.epsilon,
            acc="float32",
        )
        oracles.assert_close(y, expected, "ours")
        oracles.assert_close(theirs.apply(parameters, z), expected, "theirs")

    def test_only_y_without_return_sum(self, rng):
        arrays = self.arrays(rng)
        norm = self.ours(arrays)
        parameters = norm.init()
        y, _ = self.ours(arrays, return_sum=True).apply(parameters, *arrays)
        np.testing.assert_array_equal(norm.apply(parameters, *arrays), y)

    def test_target_variance(self, rng):
        arrays = self.arrays(rng)
        norm = self.ours(arrays, target_variance="golden")
        variance = np.var(np.asarray(norm.apply(norm.init(), *arrays), np.float64), -1)
        # epsilon takes at most epsilon / var of the variance, rounding less than WIDTH ulps.
        np.testing.assert_allclose(variance, PHI_INV, rtol=1e-3)

    @pytest.mark.parametrize("data", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("held", ["bfloat16", "float32"])
    def test_result_dtype_is_the_frameworks(self, rng, data, held):
        """`held` is what the parameters are kept in, whatever the layer made them."""
        arrays = self.arrays(rng, data)
        theirs = self.theirs(arrays[0])
        parameters = jax.tree.map(lambda leaf: leaf.astype(held), theirs.init())
        y, z = self.ours(arrays, return_sum=True).apply(parameters, *arrays)
        assert (y.dtype, z.dtype) == (theirs.apply(parameters, arrays[0]).dtype, data)

    def test_result_dtype_of_mixed_arrays(self, rng):
        arrays = self.arrays(rng)[0], self.arrays(rng, "bfloat16")[1]
        norm = self.ours(arrays, return_sum=True)
        y, z = norm.apply(norm.init(), *arrays)
        assert y.dtype == z.dtype == jnp.float32

    def test_gradients_under_jit(self, rng, implementation):
        arrays = self.arrays(rng)
        norm = self.ours(arrays, return_sum=True, implementation=implementation)
        parameters = randomised(norm.init(), rng)
        (_, z), pull = jax.vjp(jax.jit(norm.apply), parameters, *arrays)
        cts = self.arrays(rng)
        got = jax.jit(pull)(cts)
        want = oracles.layernorm_vjp(
            oracles.exactly(z),
            *cts,
            by_name(parameters)["scale"],
            epsilon=self.epsilon,
            acc="float32",
        )
        oracles.assert_close(by_name(got[0])["scale"], want.scale, "scale")
        oracles.assert_close(by_name(got[0])[self.bias], want.bias, self.bias)
        oracles.assert_close(got[1], want.identity, "identity")
        oracles.assert_close(got[2], want.residual, "residual")

    def refuses(self, arrays, error, message, **options):
        parameters = self.theirs(normal(np.random.default_rng(0), *arrays[0].shape)).init()
        with pytest.raises(error, match=message):
            self.ours(arrays, **options).apply(parameters, *arrays)

    def test_unequal_shapes_are_refused(self, rng):
        identity, residual = self.arrays(rng)
        message = r"(?s)phi_residual_layernorm.*\(2, 3, 24\).*\(3, 24\)"
        self.refuses((identity, residual[0]), ValueError, message)

    def test_integers_are_refused(self, rng):
        arrays = tuple(x.astype("int32") for x in self.arrays(rng))
        self.refuses(arrays, TypeError, "PhiResidualLayerNorm: identity.*int32")

    def test_unknown_mode_is_refused(self, rng):
        message = "mode must be one of 'phi', .*got 'golden'"
        self.refuses(self.arrays(rng), ValueError, message, mode="golden")

    def test_unknown_implementation_is_refused(self, rng):
        message = "implementation must be .*got 'triton'"
        self.refuses(self.arrays(rng), ValueError, message, implementation="triton")

    def test_negative_epsilon_is_refused(self, rng):
        message = f"{self.epsilon_is_called} must be finite and not negative, got -1e-06"
        self.refuses(self.arrays(rng), ValueError, message, epsilon=-1e-6)


class FlaxLayerNormContract(LayerNormContract):
    """What NNX and Linen have in common."""

    epsilon = 1e-6

    @pytest.mark.parametrize("param_dtype", ["float16", "float32"])
    @pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
    def test_dtype_arguments(self, rng, param_dtype, dtype):
        arrays = self.arrays(rng, "bfloat16")
        options = {"dtype": dtype, "param_dtype": param_dtype}
        ours, theirs = self.ours(arrays, **options), self.theirs(arrays[0], **options)
        parameters = theirs.init()
        assert described(ours.init()) == described(parameters)
        got = ours.apply(parameters, *arrays).dtype
        assert got == theirs.apply(parameters, arrays[0]).dtype


class PhiResidualContract:
    """PhiResidual around a dense layer, a function and a block that does not fit."""

    def build(self, x, mode="phi", **options) -> tuple[Layer, Callable[..., jax.Array]]:
        """PhiResidual around the framework's dense layer, and the apply of that layer alone."""
        raise NotImplementedError

    def around(self, function, x, *args, **options):
        """PhiResidual around a function without parameters, applied to x."""
        raise NotImplementedError

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("activation", [None, "relu", "gelu", "golden_gelu"])
    def test_adds_the_block_to_its_input(self, rng, mode, activation):
        x = normal(rng, 3, WIDTH)
        layer, block = self.build(x, mode, activation=activation)
        parameters = layer.init()
        want = phi_residual(x, block(parameters, x), mode, activation=activation)
        np.testing.assert_array_equal(layer.apply(parameters, x), want)

    def test_around_a_function_with_arguments(self, rng):
        x = normal(rng, 3, WIDTH)
        got = self.around(lambda x, factor, shift=0.0: factor * x + shift, x, 2.0, shift=1.0)
        np.testing.assert_array_equal(got, phi_residual(x, 2.0 * x + 1.0))

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_result_dtype(self, rng, dtype):
        x = normal(rng, 3, WIDTH)
        assert self.around(jnp.sin, x, options={"dtype": dtype}).dtype == (dtype or "float32")

    def test_gradients_under_jit(self, rng):
        """The block is linear and the cotangent of the sum is one: d/dx = 1 + PHI_INV * W 1."""
        x = normal(rng, 3, WIDTH)
        layer, block = self.build(x)
        parameters = layer.init()
        got = jax.jit(jax.grad(lambda x: layer.apply(parameters, x).sum()))(x)
        ones = jax.grad(lambda x: block(parameters, x).sum())(x)
        np.testing.assert_allclose(got, 1 + PHI_INV * ones, rtol=0, atol=2 * WIDTH * 2.0**-23)

    def test_a_block_that_changes_the_shape_is_refused(self, rng):
        with pytest.raises(ValueError, match=r"(?s)phi_residual.*\(3, 24\).*\(3, 23\)"):
            self.around(lambda x: x[:, 1:], normal(rng, 3, WIDTH))

    def test_unknown_settings_are_refused(self, rng):
        x = normal(rng, 3, WIDTH)
        with pytest.raises(ValueError, match=r"mode must be one of .*got 'golden'"):
            self.around(jnp.sin, x, options={"mode": "golden"})
        with pytest.raises(ValueError, match="activation"):
            self.around(jnp.sin, x, options={"activation": "tanh"})
        with pytest.raises(ValueError, match="implementation"):
            self.around(jnp.sin, x, options={"implementation": "triton"})
