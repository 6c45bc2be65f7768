"""What the attention layer of every framework must show, written once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Layer, normal, randomised
from softmax_layer_contract import NORMS, leaf_named, made_and_applied, paths
from softmax_layers import FEATURES, HEADS, POSITIONS

from syntonic_jax import PHI


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
