"""Attention whose keys have weights of any size, heads of any size, batches of any rank.

The two ways of adding the weights agree to rounding, and `path` says which one it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen
from layer_contract import normal, randomised
from softmax_layer_contract import NORMS
from softmax_layers import ATTENTIONS, PATHS

from syntonic_jax import PHI_INV
from syntonic_jax.nn._shared import attention as _attention
from syntonic_jax.ops._attention import folded

POSITIONS, SIZE, SPACING = 7, 64, 8.0
STEPS = np.array([0.0, 3.0, 1.0, 5.0, 2.0, 4.0, 6.0])
# Mode norms; times √64 / φ they are beyond float16 from 13,249 on, together with what is masked.
FAR = {
    "near": STEPS,
    "far": np.where(STEPS == 0, 0, 13_300 + SPACING * STEPS),
    "farther": np.where(STEPS == 0, 0, 1e6 + SPACING * STEPS),
    "shared": 1e6 + STEPS / 4,
    "negative": np.where(STEPS == 0, -1e6, -SPACING * STEPS),
}


@pytest.fixture(params=ATTENTIONS)
def framework(request):
    return request.param


def with_norms(parameters, norms, dtype):
    """The mode norms in float32, all else in the type of the data, as in mixed precision."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.asarray(norms, "float32")
            if NORMS in jax.tree_util.keystr(path)
            else leaf.astype(dtype)
        ),
        parameters,
    )


@pytest.mark.parametrize(
    ("framework", "dtype", "far"),
    [("nnx", d, f) for d in ("float16", "bfloat16", "float32") for f in FAR]
    + [("linen", "float16", "far"), ("haiku", "float16", "far")],
)
def test_bias_and_folded_agree(rng, framework, dtype, far):
    """Of keys that all queries see, and without the weightiest, which the others are far from.

    Eager: a compiled CPU program has no product of float16 matrices with float32 sums.
    """
    x, norms = normal(rng, 2, POSITIONS, SIZE, dtype=dtype), FAR[far]
    options = {} if framework == "haiku" else {"dtype": dtype}
    layers = [
        ATTENTIONS[framework](x, heads=1, num_positions=POSITIONS, weighting=w, **options)
        for w in ("bias", "folded")
    ]
    parameters = with_norms(randomised(layers[0].init(), rng), norms, dtype)
    # Small logits, and values of about 1.
    parameters = jax.tree.map(lambda p: p / 8 if p.ndim > 1 else p, parameters)
    seen = np.ones((POSITIONS, POSITIONS), bool)
    seen[2:, np.argmin(norms)] = False
    bias, folded = (layer.apply(parameters, x, mask=seen) for layer in layers)
    assert bias.dtype == folded.dtype == dtype
    bias, folded = oracles.real(bias), oracles.real(folded)
    # A probability errs by what its logit does: by a few units of float32 of the largest number
    # in the sum. It and the result are rounded to the type of x.
    difference = PHI_INV * (norms.max() - norms.min())
    units = 4 * (difference + SIZE) * 2.0**-24 + 4 * oracles.unit(dtype)
    scale = np.max(np.abs(bias))
    np.testing.assert_allclose(folded, bias, rtol=0, atol=units * scale)
    # The test can fail: keys of the same weight give something else.
    alike = with_norms(parameters, np.zeros(POSITIONS), dtype)
    other = oracles.real(layers[0].apply(alike, x, mask=seen))
    assert np.max(np.abs(other - bias)[:, 2:]) > 2 * units * scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_parts_hold_the_digits_of_float32(dtype, x64):
    """Also compiled, where a conversion and back may be left out; every derivative is 1.

    Of numbers up to 2**26, which is 2**30 times √256.
    """
    accumulation = jnp.promote_types(dtype, jnp.float32)
    magnitudes = jnp.asarray(np.geomspace(2.0**-14, 2.0**26, 300), accumulation)
    added = jnp.concatenate([-magnitudes, magnitudes, jnp.zeros(1, accumulation)])
    key = jnp.zeros((1, added.size, 1, 256), dtype)
    query = jnp.zeros((1, 1, 1, 256), dtype)

    def summed(added):
        queries, keys, _ = folded(query, key, key, added)
        products = queries[0, 0, 0].astype("float64") * keys[0, :, 0].astype("float64")
        return products.sum(-1) / 16

    for f in (summed, jax.jit(summed)):
        # 24 bits. Those of float16 have the last part alone below 2**-6, half of whose last bit
        # is 2**-17; the root takes 2**-4 of it.
        atol = 2.0**-21 if dtype == "float16" else 0
        np.testing.assert_allclose(f(added), added, rtol=2.0**-24, atol=atol)
    slopes = jax.grad(lambda a: summed(a).sum())(added)
    np.testing.assert_array_equal(slopes, 1)


def test_what_all_keys_share_costs_no_digits(rng, framework):
    """In float32 a shared norm of 1e6 would leave a logit no more than 4 binary places."""
    x = normal(rng, 2, POSITIONS, SIZE)
    results = []
    for weighting in ("bias", "folded"):
        layer = ATTENTIONS[framework](x, heads=1, num_positions=POSITIONS, weighting=weighting)
        parameters = randomised(layer.init(), np.random.default_rng(0))
        parameters = jax.tree.map(lambda p: p / 8 if p.ndim > 1 else p, parameters)
        for shared in (0.0, 2.0**20):
            results.append(layer.apply(with_norms(parameters, shared + STEPS, "float32"), x))
    for y in results[1:]:
        # Norms from 0 to 6 and logits of 64 terms, rounded a few times.
        np.testing.assert_allclose(
            y, results[0], rtol=0, atol=512 * 2.0**-24 * np.max(np.abs(results[0]))
        )


# ------------------------------------------------------------------------- the size of a head


def test_heads_that_leave_no_room(framework, monkeypatch):
    """cuDNN's heads have up to 256 features; three more are wanted, in steps of eight."""
    path = PATHS[framework]
    for size, taken in ((4, "folded"), (128, "folded"), (248, "folded"), (256, "bias")):
        assert path(size, implementation="cudnn") == taken
        assert path(size) == path(size, implementation="xla") == "bias"
        assert path(size, weighting="folded") == "folded"  # XLA has room
        assert path(size, mode="identity", implementation="cudnn") == "none"
    with pytest.raises(ValueError, match="SyntonicAttention: weighting must be 'bias' for heads"):
        path(256, implementation="cudnn", weighting="folded")
    monkeypatch.setattr(_attention, "cuda_compute_capabilities", lambda: ("8.0",))
    for size, taken in ((120, "folded"), (128, "bias")):
        assert path(size, implementation="cudnn") == taken


@pytest.mark.parametrize(
    ("framework", "dtype", "size", "masked"),
    [("nnx", d, s, m) for d in ("float16", "bfloat16") for s in (248, 256) for m in (False, True)]
    + [(f, "float16", 256, True) for f in ("linen", "haiku")],
)
def test_what_cudnn_is_given(rng, framework, dtype, size, masked, monkeypatch):
    """What jax asks of arrays for cuDNN; their attention is that of XLA with a bias a key."""
    plain, calls = jax.nn.dot_product_attention, []

    def cudnn(query, key, value, bias=None, mask=None, *, scale, is_causal, implementation):
        assert implementation == "cudnn"
        assert query.shape[-1] <= 256
        assert query.shape[-1] % 8 == 0
        for extra in (bias, mask):
            assert extra is None or extra.shape[2:] == (query.shape[1], key.shape[1])
        if bias is not None:
            assert bias.dtype == query.dtype
        if mask is not None and bias is not None:  # it adds them
            bias, mask = bias + jnp.where(mask, 0, -(2.0**15)), None
        calls.append(bias is not None)
        return plain(query, key, value, bias, mask, scale=scale, is_causal=is_causal)

    x = normal(rng, 2, 3, POSITIONS, size, dtype=dtype)
    mask = np.ones((3, 1, POSITIONS, POSITIONS), bool)
    mask[..., 2:, 0], mask[1, :, :, 1] = False, False
    options = {} if framework == "haiku" else {"dtype": dtype}
    results = []
    for implementation in ("xla", "cudnn"):
        if implementation == "cudnn":
            monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
        layer = ATTENTIONS[framework](
            x, heads=1, num_positions=POSITIONS, implementation=implementation, **options
        )
        parameters = randomised(layer.init(), np.random.default_rng(0))
        parameters = jax.tree.map(lambda p: p / 16 if p.ndim > 1 else p, parameters)
        parameters = with_norms(parameters, STEPS, dtype)
        results.append(oracles.real(layer.apply(parameters, x, mask=mask if masked else None)))
    assert calls[-1] == (size == 256)
    # As a bias the logarithms, up to 4, are rounded to the type of x.
    bound = 16 * oracles.unit(dtype) * np.max(np.abs(results[0]))
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=bound)


# ------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("batch", "weighting"), [((), "folded"), ((2, 3), "bias"), ((2, 1, 3), "folded")]
)
def test_any_number_of_leading_axes(rng, framework, weighting, batch):
    """Masks and syntony broadcast along them; each example is as it is alone."""
    x = normal(rng, *batch, POSITIONS, 12)
    other = normal(rng, *batch, POSITIONS - 2, 12)
    keys = POSITIONS - 2
    masks = [None, (1,) * len(batch) + (3, POSITIONS, keys), (*batch, 1, 1, keys), (keys,)]
    syntonies = [(keys,), (*batch, keys)]
    call = {"syntony": jnp.ones(POSITIONS)}
    layer = ATTENTIONS[framework](x, mode="provided", weighting=weighting, call=call)
    parameters = randomised(layer.init(), rng)
    for shape, weights in zip(masks, syntonies * 2, strict=True):
        mask = None if shape is None else rng.random(shape) < 0.7
        syntony = jnp.exp(normal(rng, *weights))
        y = layer.apply(parameters, x, other, mask=mask, syntony=syntony)
        assert y.shape == x.shape
        if mask is not None and len(shape) > 1:
            mask = np.broadcast_to(mask, (*batch, *shape[-3:]))
        for place in np.ndindex(batch):
            alone = layer.apply(
                parameters,
                x[place],
                other[place],
                mask=mask[place] if mask is not None and mask.ndim > 1 else mask,
                syntony=syntony if len(weights) == 1 else syntony[place],
            )
            # Sums of 12 features in another order.
            scale = max(1.0, float(np.max(np.abs(alone))))
            np.testing.assert_allclose(y[place], alone, rtol=0, atol=256 * 2.0**-24 * scale)


def test_shapes_that_do_not_fit(rng, framework):
    x = normal(rng, 2, 3, POSITIONS, 12)
    layer = ATTENTIONS[framework](x, num_positions=POSITIONS)
    parameters = layer.init()
    for message, arguments, options in (
        (r"keys must have the leading axes \(2, 3\) of the queries, got \(3,\)", (x[0],), {}),
        (r"values must have the leading axes \(2, 3\) of the queries", (x, x[0]), {}),
        (
            r"mask must broadcast to the shape \(2, 3, 3, 7, 7\) of the logits, got \(2, 7, 7\)",
            (),
            {"mask": np.ones((2, 7, 7), bool)},
        ),
    ):
        with pytest.raises(ValueError, match=f"SyntonicAttention: {message}"):
            layer.apply(parameters, x, *arguments, **options)


# ---------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_masks_of_the_frameworks(rng, framework, dtype):
    """Flax makes masks of floats; what is 0 is masked."""
    x = normal(rng, 2, POSITIONS, 12)
    lengths = np.array([4, 6])
    kept = jnp.asarray(np.arange(POSITIONS) < lengths[:, None])
    mask = linen.combine_masks(
        linen.make_attention_mask(kept, kept), linen.make_causal_mask(kept), dtype=dtype
    )
    assert mask.dtype == dtype
    layer = ATTENTIONS[framework](x, num_positions=POSITIONS)
    parameters = randomised(layer.init(), rng)
    want = layer.apply(parameters, x, mask=mask.astype(bool))
    np.testing.assert_array_equal(layer.apply(parameters, x, mask=mask), want)
    assert np.max(np.abs(want - layer.apply(parameters, x))) > 0.01
