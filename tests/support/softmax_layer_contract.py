"""What the softmax layers of every framework must show, written once.

`tests/nn/test_<framework>_softmax.py` subclasses the contracts and says how a layer is built there.
Arguments are named as in Flax.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layer_contract import Layer, normal, randomised
from softmax_layers import FEATURES

from syntonic_jax import PHI, syntonic_cross_entropy, syntonic_softmax

CLASSES = 5
NORMS = "mode_norms"


def paths(tree) -> dict[str, tuple[int, ...]]:
    """The shapes of a tree of parameters by their last two names."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        names = [part for name in names for part in name.split("/") if part.isidentifier()]
        names = [name for name in names if name not in ("params", "value")]
        found["/".join(names[-2:])] = leaf.shape
    return found


def leaf_named(tree, name):
    (found,) = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if name in jax.tree_util.keystr(path)
    ]
    return found


def with_leaf(tree, name, value):
    """The tree with another value in the leaf of this name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: value.astype(leaf.dtype) if name in jax.tree_util.keystr(path) else leaf,
        tree,
    )


def made_and_applied(contract, x, call, options):
    layer = contract.build(x, call=call, **options)
    return layer.apply(layer.init(), x, **call)


class SoftmaxContract:
    """SyntonicSoftmax."""

    keyed = True  # whether initialisers take a key

    def build(self, x, **options) -> Layer:
        """Applied to (parameters, x, syntony=None, where=None, labels=None)."""
        raise NotImplementedError

    def data(self, rng, dtype="float32"):
        return normal(rng, 2, 3, CLASSES, dtype=dtype)

    def test_parameters(self, rng):
        x = self.data(rng)
        learned = self.build(x, mode="learned").init()
        assert list(paths(learned).values()) == [(CLASSES,)]
        np.testing.assert_array_equal(leaf_named(learned, NORMS), np.ones(CLASSES))
        for mode in ("identity", "provided"):
            options: dict[str, Any] = {"syntony": jnp.ones(CLASSES)} if mode == "provided" else {}
            assert jax.tree.leaves(self.build(x, mode=mode, call=options).init()) == []

    def test_initialisers(self, rng):
        x = self.data(rng)

        def sevens(*arguments):
            *key, shape, dtype = arguments
            assert len(key) == self.keyed
            return jnp.full(shape, 7, dtype)

        for init, expected in (
            ("ones", np.ones(CLASSES)),
            ("index_squared", np.arange(CLASSES) ** 2),
            (sevens, np.full(CLASSES, 7)),
        ):
            parameters = self.build(x, mode_norms_init=init).init()
            np.testing.assert_array_equal(leaf_named(parameters, NORMS), expected)

    @pytest.mark.parametrize("axis", [-1, 1])
    def test_is_the_function(self, rng, axis):
        x = self.data(rng)
        width, scale = x.shape[axis], 0.7
        where = jnp.asarray(rng.random(x.shape) < 0.8)
        labels = jnp.zeros(np.delete(x.shape, axis), int)
        build = functools.partial(self.build, x, num_features=width, axis=axis, scale=scale)
        learned = build(mode="learned")
        parameters = randomised(learned.init(), rng)
        norms = leaf_named(parameters, NORMS)
        syntony = jnp.exp(normal(rng, 2, 3, CLASSES))
        for layer, values, call, weights in (
            (learned, parameters, {}, {"mode_norms": norms}),
            (build(mode="identity"), None, {}, {}),
            (build(mode="provided"), None, {"syntony": syntony}, {"syntony": syntony}),
        ):
            if values is None:  # none, but in the form that the framework has for it
                values = self.empty(layer, call)
            options: Any = {"axis": axis, "scale": scale, **weights}
            np.testing.assert_array_equal(
                layer.apply(values, x, where=where, **call),
                syntonic_softmax(x, where=where, **options),
            )
            np.testing.assert_array_equal(
                layer.apply(values, x, labels=labels, **call),
                syntonic_cross_entropy(x, labels, **options),
            )

    def test_a_label_out_of_use(self, rng):
        x, labels = self.data(rng), jnp.asarray([[-100, 1, 2], [0, -100, 4]])
        layer = self.build(x)
        parameters, options = layer.init(), {"labels": labels, "ignore_index": -100}
        norms = leaf_named(parameters, NORMS)
        np.testing.assert_array_equal(
            layer.apply(parameters, x, **options),
            syntonic_cross_entropy(x, mode_norms=norms, **options),
        )
        with pytest.raises(ValueError, match="SyntonicSoftmax: ignore_index is for labels only"):
            layer.apply(parameters, x, ignore_index=-100)

    def empty(self, layer, call):
        """The parameters of a layer without any."""
        raise NotImplementedError

    @pytest.mark.parametrize("data", ["bfloat16", "float32"])
    @pytest.mark.parametrize("held", ["bfloat16", "float32"])
    def test_result_dtype(self, rng, data, held):
        """The promoted dtype of data and parameter, in Flax and Haiku alike."""
        x = self.data(rng, data)
        layer = self.build(x)
        parameters = jax.tree.map(lambda leaf: leaf.astype(held), layer.init())
        y = layer.apply(parameters, x)
        assert y.dtype == jnp.promote_types(data, held)
        assert layer.apply(parameters, x, labels=jnp.zeros((2, 3), int)).dtype == jnp.float32

    def test_gradient_of_the_mode_norms(self, rng):
        x = self.data(rng)
        layer = self.build(x)
        parameters = randomised(layer.init(), rng)

        def loss(parameters):
            return jnp.sum(jnp.sin(layer.apply(parameters, x)))

        got = leaf_named(jax.jit(jax.grad(loss))(parameters), NORMS)
        want = jax.jit(jax.grad(lambda norms: jnp.sum(jnp.sin(jax.nn.softmax(x - norms / PHI)))))(
            leaf_named(parameters, NORMS)
        )
        # Six rows of a few roundings each, of numbers below 1.
        np.testing.assert_allclose(got, want, rtol=0, atol=6 * 16 * 2.0**-24)

    def test_bad_arguments_are_refused(self, rng):
        x, syntony = self.data(rng), jnp.ones(CLASSES)
        for message, call, options in (
            ("mode must be one of 'identity', .*got 'golden'", {}, {"mode": "golden"}),
            ("mode_norms_init must be 'ones'.*got 'twos'", {}, {"mode_norms_init": "twos"}),
            ("syntony must be given in mode 'provided'", {}, {"mode": "provided"}),
            ("syntony must not be given in mode 'learned'", {"syntony": syntony}, {}),
            (
                "syntony must not be given in mode 'identity'",
                {"syntony": syntony},
                {"mode": "identity"},
            ),
            (r"mode_norms .*\(5,\), got \(4,\)", {}, {"num_features": 4}),
            ("axis must lie", {}, {"axis": 3}),
        ):
            with pytest.raises(ValueError, match=f"(?i)syntonic_?softmax: {message}"):
                made_and_applied(self, x, call, {"num_features": CLASSES} | options)


class ClassifierContract:
    """SyntonicClassifier."""

    dense: tuple[str, str]  # the framework's names of weights and bias

    def build(self, x, method="__call__", **options) -> Layer:
        """Applied by a method to (parameters, x, …)."""
        raise NotImplementedError

    def logits(self, parameters, x):
        weights, bias = (leaf_named(parameters, name) for name in self.dense)
        return jnp.dot(x, weights) + bias

    @pytest.fixture
    def x(self, rng):
        return normal(rng, 8, FEATURES)

    def test_parameters(self, x):
        weights, bias = (name.strip("['].") for name in self.dense)
        shapes = paths(self.build(x, num_classes=CLASSES).init())
        assert shapes == {
            f"dense/{weights}": (FEATURES, CLASSES),
            f"dense/{bias}": (CLASSES,),
            "softmax/mode_norms": (CLASSES,),
        }

    def test_probabilities_and_loss(self, rng, x):
        labels = jnp.asarray(rng.integers(0, CLASSES, size=8))
        options: Any = {"num_classes": CLASSES, "scale": 0.5}
        layer, loss = (self.build(x, method, **options) for method in ("__call__", "loss"))
        parameters = randomised(layer.init(), rng)
        z = self.logits(parameters, x) - 0.5 / PHI * leaf_named(parameters, NORMS)
        y = layer.apply(parameters, x)
        # FEATURES products of a few units, and their sum, move z, and y relatively.
        error = 64 * FEATURES * 2.0**-24
        np.testing.assert_allclose(y, jax.nn.softmax(z), rtol=error, atol=1e-30)
        want = optax.softmax_cross_entropy_with_integer_labels(z, labels)
        np.testing.assert_allclose(loss.apply(parameters, x, labels), want, rtol=0, atol=error)
        np.testing.assert_allclose(y.sum(-1), 1, rtol=0, atol=8 * 2.0**-24)

    def test_a_label_out_of_use(self, rng, x):
        """Its row takes no part in the loss and in no gradient."""
        labels = jnp.asarray(rng.integers(0, CLASSES, size=8)).at[3].set(-100)
        layer = self.build(x, "loss", num_classes=CLASSES)
        parameters = randomised(layer.init(), rng)
        kept = jnp.arange(8) != 3

        def loss(parameters, x):
            return jnp.sum(layer.apply(parameters, x, labels, ignore_index=-100))

        def expected(parameters, x):
            return jnp.sum(layer.apply(parameters, x[kept], labels[kept]))

        for f, g in ((loss, expected), (jax.grad(loss), jax.grad(expected))):
            jax.tree.map(
                # Sums of 8 numbers of the size of 10, in another order.
                functools.partial(np.testing.assert_allclose, rtol=0, atol=8 * 10 * 2.0**-23),
                f(parameters, x),
                g(parameters, x),
            )
        with jax.debug_nans(True):
            assert np.isfinite(loss(parameters, x))

    def test_trains(self, rng, x):
        """All parameters, the mode norms too, towards the labels of a few points."""
        labels = jnp.asarray(rng.integers(0, CLASSES, size=8))
        layer = self.build(x, "loss", num_classes=CLASSES, mode_norms_init="index_squared")
        start = parameters = layer.init()
        rule = optax.adam(0.1)
        state = rule.init(parameters)

        @jax.jit
        def step(parameters, state):
            value, slopes = jax.value_and_grad(lambda p: jnp.mean(layer.apply(p, x, labels)))(
                parameters
            )
            updates, state = rule.update(slopes, state)
            return optax.apply_updates(parameters, updates), state, value

        losses = []
        for _ in range(60):
            parameters, state, value = step(parameters, state)
            losses.append(float(value))
        assert losses[-1] < 0.2 * losses[0]
        for before, after in zip(*map(jax.tree.leaves, (start, parameters)), strict=True):
            assert not np.array_equal(before, after)
