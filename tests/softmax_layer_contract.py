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
from softmax_layers import FEATURES, HEADS, POSITIONS

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


def plain_attention(query, key, value, added=None, mask=None):
    """In jnp, from the definition; added to the logits, of a shape that broadcasts to theirs."""
    logits = jnp.einsum("bqhf,bkhf->bhqk", query, key) / np.sqrt(query.shape[-1])
    if added is not None:
        logits = logits + added
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    return jnp.einsum("bhqk,bkhf->bqhf", jax.nn.softmax(logits), value)


class AttentionContract:
    """SyntonicAttention beside the framework's own multi-head attention."""

    def build(self, x, **options) -> Layer:
        """Applied to (parameters, x, …)."""
        raise NotImplementedError

    def theirs(self, x) -> Layer:
        """The framework's, applied to (parameters, x, mask)."""
        raise NotImplementedError

    def path(self, **options) -> str:
        """What the layer says of how it adds the weights."""
        raise NotImplementedError

    def project(self, parameters, x):
        """Query, key and value, and a function for what comes after the attention."""
        raise NotImplementedError

    @pytest.fixture
    def x(self, rng):
        return normal(rng, 2, POSITIONS, FEATURES)

    def close(self, got, want):
        """Two orders of the same sums: of 12 features, 4 in a head, 7 positions, 12 again."""
        scale = float(np.max(np.abs(want)))
        np.testing.assert_allclose(got, want, rtol=0, atol=256 * 2.0**-24 * max(1.0, scale))

    def test_identity_mode_is_the_frameworks(self, rng, x):
        ours, theirs = self.build(x, mode="identity"), self.theirs(x)
        parameters = theirs.init()
        assert jax.tree.structure(ours.init()) == jax.tree.structure(parameters)
        parameters = randomised(parameters, rng)
        mask = np.tri(POSITIONS, dtype=bool)[None, None]
        for options, seen in (({}, None), ({"mask": mask}, mask), ({"is_causal": True}, mask)):
            self.close(ours.apply(parameters, x, **options), theirs.apply(parameters, x, seen))

    def test_parameters(self, x):
        shapes = paths(self.build(x, num_positions=POSITIONS + 2).init())
        norms = {name: shape for name, shape in shapes.items() if NORMS in name}
        assert list(norms.values()) == [(POSITIONS + 2,)]
        assert len(shapes) == 9

    @pytest.mark.parametrize("weighting", ["bias", "folded"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_learned_mode(self, rng, x, weighting, causal):
        """Values and gradients, with a mask and more mode norms than positions."""
        layer = self.build(x, num_positions=POSITIONS + 2, scale=0.7, weighting=weighting)
        parameters = randomised(layer.init(), rng)
        mask = rng.random((2, 1, POSITIONS, POSITIONS)) < 0.7
        mask[..., 0] = True
        seen = mask & np.tri(POSITIONS, dtype=bool) if causal else mask

        def ours(parameters):
            return layer.apply(parameters, x, mask=mask, is_causal=causal)

        def plain(parameters):
            norms = leaf_named(parameters, NORMS)[:POSITIONS]
            query, key, value, after = self.project(parameters, x)
            return after(plain_attention(query, key, value, -0.7 / PHI * norms, seen))

        self.close(ours(parameters), plain(parameters))
        got, want = (
            jax.jit(jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p)))))(parameters)
            for f in (ours, plain)
        )
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            # Sums over 2 · 7 queries and 12 features of what `close` allows each.
            scale = max(1.0, float(np.max(np.abs(b))))
            np.testing.assert_allclose(a, b, rtol=0, atol=14 * 12 * 256 * 2.0**-24 * scale)

    @pytest.mark.parametrize("weighting", ["bias", "folded"])
    @pytest.mark.parametrize("shape", [(POSITIONS,), (2, POSITIONS)])
    def test_provided_mode(self, rng, x, weighting, shape):
        syntony = jnp.exp(normal(rng, *shape))
        call = {"syntony": syntony}
        layer = self.build(x, mode="provided", weighting=weighting, call=call)
        parameters = randomised(layer.init(), rng)
        query, key, value, after = self.project(parameters, x)
        added = jnp.log(syntony).reshape(-1, 1, 1, POSITIONS)
        self.close(
            layer.apply(parameters, x, **call), after(plain_attention(query, key, value, added))
        )

    def test_folding_keeps_the_digits_of_bfloat16(self, rng, x):
        """Logits near -80, a bfloat16 of which would be off by up to 1/4 when halved."""

        def far(*arguments):
            *_, shape, dtype = arguments
            return 128 + jnp.arange(*shape, dtype=dtype)

        x = x.astype("bfloat16")
        options: Any = {"num_positions": POSITIONS, "mode_norms_init": far}
        layers = [self.build(x, weighting=w, **options) for w in ("bias", "folded")]
        parameters = jax.tree.map(lambda p: p.astype("bfloat16"), layers[0].init())
        bias, folded = (np.asarray(layer.apply(parameters, x), np.float32) for layer in layers)
        # Probabilities and results are rounded to bfloat16, which may tip either.
        np.testing.assert_allclose(
            folded, bias, rtol=0, atol=4 * 2.0**-8 * float(np.max(np.abs(bias)))
        )

    def test_keys_of_their_own(self, rng, x):
        """Cross attention, also without a batch; fewer keys than mode norms."""
        layer = self.build(x, num_positions=POSITIONS)
        parameters = randomised(layer.init(), rng)
        other = normal(rng, 2, POSITIONS - 3, FEATURES)
        y = layer.apply(parameters, x, other)
        assert y.shape == x.shape
        self.close(layer.apply(parameters, x[0], other[0]), y[0])
        self.close(layer.apply(parameters, x, other, other), y)

    def test_says_which_path_it_takes(self):
        assert self.path(mode="identity", implementation="cudnn") == "none"
        assert self.path() == self.path(implementation="xla") == "bias"
        assert self.path(implementation="cudnn") == "folded"
        assert self.path(implementation="cudnn", weighting="bias") == "bias"
        assert self.path(weighting="folded", mode="provided") == "folded"

    @pytest.mark.parametrize("weighting", ["bias", "folded"])
    def test_the_path_is_taken(self, rng, x, weighting):
        """Folded, heads have eight features in place of four, and nothing is added to logits."""
        layer = self.build(x, weighting=weighting)
        text = str(jax.make_jaxpr(layer.apply)(layer.init(), x))
        assert (f"f32[2,{POSITIONS},{HEADS},8]" in text) == (weighting == "folded")

    def test_bad_arguments_are_refused(self, rng, x):
        syntony = jnp.ones(POSITIONS + 1)
        for message, call, options in (
            ("mode must be one of 'identity', .*got 'golden'", {}, {"mode": "golden"}),
            ("mode_norms_init must be 'ones'", {}, {"mode_norms_init": "twos"}),
            ("weighting must be None, 'bias' or 'folded', got 'x'", {}, {"weighting": "x"}),
            ("there must be a mode norm for each key position", {}, {"num_positions": 3}),
            ("syntony must be given in mode 'provided'", {}, {"mode": "provided"}),
            ("syntony must not be given in mode 'learned'", {"syntony": syntony}, {}),
            (
                r"syntony must have one of the shapes \[\(7,\), \(2, 7\)\], got \(8,\)",
                {"syntony": syntony},
                {"mode": "provided"},
            ),
        ):
            with pytest.raises(ValueError, match=f"SyntonicAttention: {message}"):
                made_and_applied(self, x, call, {"num_positions": POSITIONS} | options)
