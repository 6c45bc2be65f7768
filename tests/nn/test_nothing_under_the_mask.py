"""What a mask leaves empty poisons nothing: values, statistics, derivatives of the layers.

A row of a layer norm or a channel of a batch norm of which nothing is left is its bias, and has no
derivative; running statistics of such a channel stay as they were.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_norm_contract import on_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layer_contract import by_name, described, normal, randomised
from norm_layers import BATCH_NORMS, LAYER_NORMS
from softmax_layer_contract import leaf_named
from softmax_layers import ATTENTIONS, CLASSIFIERS, SOFTMAXES

ROWS, WIDTH = 16, 6
EMPTY_ROWS, EMPTY_CHANNEL = np.array([3, 4, 5]), 2
MASKED = ("nnx", "linen")  # Haiku's norms have no mask


def close(got, want, terms=ROWS * WIDTH):
    """The same sums of so many terms in another order, in float64."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all()
        scale = max(1.0, float(np.max(np.abs(b))))
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * terms * 2.0**-53 * scale)


def derivatives(loss, *operands):
    """The gradients, and how they change along a direction: both orders in one compilation."""
    gradient = jax.grad(loss, tuple(range(len(operands))))
    return jax.jit(lambda *o: jax.jvp(gradient, o, jax.tree.map(jnp.cos, o)))(*operands)


# ------------------------------------------------------------------------------- layer norms


def empty_rows(rng, form):
    """A mask that leaves nothing of some rows, and something of the others."""
    mask = ~np.isin(np.arange(ROWS), EMPTY_ROWS)[:, None]
    if form == "rows":
        return mask
    mask = mask & (rng.random((ROWS, WIDTH)) < 0.7)
    mask[:, :2] |= ~np.isin(np.arange(ROWS), EMPTY_ROWS)[:, None]
    return mask.astype("float32") if form == "numbers" else mask


@pytest.fixture
def rows(rng, x64):
    x = normal(rng, ROWS, WIDTH, dtype="float64")
    return x, normal(rng, ROWS, WIDTH, dtype="float64"), np.delete(np.arange(ROWS), EMPTY_ROWS)


def parameters_of(norm, rng):
    parameters, statistics = norm.init()
    parameters = jax.tree.map(lambda p: p.astype("float64"), randomised(parameters, rng))
    return parameters, statistics


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize(
    ("form", "feature_axes", "poison"),
    [("rows", -1, np.nan), ("full", 0, 1.0), ("numbers", -1, 1.0), ("full", 0, np.inf)],
)
def test_rows(rng, rows, framework, form, feature_axes, poison, implementation):
    """As if the rows were not there, whatever is in them; parameters along rows or across them."""
    x, weights, left = rows
    mask = empty_rows(rng, form)
    x = x.at[EMPTY_ROWS].multiply(poison)  # where a row has nothing it may hold anything
    options = {"feature_axes": feature_axes, "implementation": implementation}
    norm = LAYER_NORMS[framework](False, x, **options)
    parameters, _ = parameters_of(norm, rng)

    y, _ = norm.apply(parameters, {}, x, mask=mask)
    held = by_name(parameters)
    bias = jnp.broadcast_to(held["bias"][:, None] if feature_axes == 0 else held["bias"], x.shape)
    np.testing.assert_array_equal(y[EMPTY_ROWS], bias[EMPTY_ROWS])

    def loss(parameters, x):
        return jnp.sum(weights * jnp.sin(norm.apply(parameters, {}, x, mask=mask)[0]))

    def without(parameters, x):
        """The rows that are left, with what there is of the parameters for them."""
        if feature_axes == 0:
            parameters = jax.tree.map(lambda p: p[left], parameters)
        short = LAYER_NORMS[framework](False, x[left], **options)
        y, _ = short.apply(parameters, {}, x[left], mask=np.broadcast_to(mask, x.shape)[left])
        return jnp.sum(weights[left] * jnp.sin(y))

    for got, want in zip(*(derivatives(f, parameters, x) for f in (loss, without)), strict=True):
        close(got, want)
        np.testing.assert_array_equal(got[1][EMPTY_ROWS], 0)


@pytest.mark.parametrize("framework", MASKED)
def test_what_is_not_finite_under_the_mask(rng, rows, framework):
    """NaN and infinity that a mask hides, in rows of which something is left."""
    x, weights, _ = rows
    mask = rng.random((ROWS, WIDTH)) < 0.7
    mask[:, :2], mask[:, 2:4] = True, False
    norm = LAYER_NORMS[framework](False, x)
    parameters, _ = parameters_of(norm, rng)

    def loss(parameters, x):
        y, _ = norm.apply(parameters, {}, x, mask=mask)
        return jnp.sum(jnp.where(mask, weights * jnp.sin(y), 0))

    poisoned = x.at[:, 2].set(np.nan).at[:, 3].set(np.inf)
    got, want = (derivatives(loss, parameters, x) for x in (poisoned, x))
    close(got, want)


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize("how", ["vmap", "shard_map", "sharded"])
def test_rows_over_devices(rng, rows, framework, how):
    """Rows of which nothing is left on any device, and those of which something is on one."""
    x, weights, _ = rows
    x = jnp.concatenate([x, x[::-1]], -1)[:, : ROWS // 2 * 1].T  # [8, 16]: reduced axis first
    weights = weights[:, :1].T * jnp.ones_like(x)
    mask = rng.random(x.shape) < 0.6
    mask[:, EMPTY_ROWS], mask[:, 0] = False, False
    mask[1, 0] = True
    options = {"reduction_axes": 0, "feature_axes": 1}
    whole = LAYER_NORMS[framework](False, x, **options)
    parameters, _ = parameters_of(whole, rng)
    mapped = {} if how == "sharded" else {"axis_name": "d"}
    norm = LAYER_NORMS[framework](False, x, **options, **mapped)

    def cut(parameters, x):
        if how == "sharded":
            mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("d")))
            y, _ = norm.apply(parameters, {}, x, mask=mask)
        else:
            y, _ = on_devices(
                how, lambda a: norm.apply(parameters, {}, a[0], mask=a[1]), (x, jnp.asarray(mask))
            )
        return jnp.sum(weights * jnp.sin(y))

    def one(parameters, x):
        return jnp.sum(weights * jnp.sin(whole.apply(parameters, {}, x, mask=mask)[0]))

    for got, want in zip(*(derivatives(f, parameters, x) for f in (cut, one)), strict=True):
        close(got, want)
        np.testing.assert_array_equal(got[1][:, EMPTY_ROWS], 0)


# ------------------------------------------------------------------------------- batch norms


def empty_channel(rng):
    mask = rng.random((ROWS, WIDTH)) < 0.7
    mask[:2] = True
    mask[:, EMPTY_CHANNEL] = False
    return mask


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize(
    ("dtype", "jitted"), [("float16", True), ("bfloat16", True), ("float32", False)]
)
def test_a_batch_of_padding_leaves_the_statistics(rng, framework, dtype, jitted, implementation):
    x = normal(rng, ROWS, WIDTH, dtype=dtype)
    norm = BATCH_NORMS[framework](False, x, momentum=0.9, implementation=implementation)
    parameters, statistics = norm.init()
    parameters = randomised(parameters, rng)
    _, before = norm.apply(parameters, statistics, x)
    apply = jax.jit(norm.apply) if jitted else norm.apply
    for mask in (np.zeros((ROWS, 1), bool), np.zeros(ROWS)[:, None]):
        y, after = apply(parameters, before, x, mask=mask)
        assert described(after) == described(before)
        bias = by_name(parameters)["bias"].astype(y.dtype)
        np.testing.assert_array_equal(y, jnp.broadcast_to(bias, y.shape))


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize("how", ["whole", "vmap", "pmap", "shard_map", "sharded"])
def test_an_empty_channel_keeps_its_statistics(rng, framework, how):
    """Bit for bit; the others are updated as if it were not there."""
    x, mask = normal(rng, ROWS, WIDTH), jnp.asarray(empty_channel(rng))
    mapped = {} if how in ("whole", "sharded") else {"axis_name": "d"}
    norm = BATCH_NORMS[framework](False, x, momentum=0.9, **mapped)
    whole = BATCH_NORMS[framework](False, x, momentum=0.9)
    parameters, statistics = whole.init()
    _, before = whole.apply(parameters, statistics, x)
    # Every other channel has something; a device may have nothing of it.
    mask = mask.at[4:6].set(False)
    if how == "sharded":
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        x, mask = (jax.device_put(a, NamedSharding(mesh, P("d"))) for a in (x, mask))
    if mapped:
        y, after = on_devices(
            how, lambda a: norm.apply(parameters, before, a[0], mask=a[1]), (x, mask)
        )
    else:
        y, after = jax.jit(norm.apply)(parameters, before, x, mask=mask)
    _, unmasked = whole.apply(parameters, before, x, mask=mask.at[:, EMPTY_CHANNEL].set(True))
    for new, old, other in zip(*map(jax.tree.leaves, (after, before, unmasked)), strict=True):
        assert new[EMPTY_CHANNEL] == old[EMPTY_CHANNEL]
        # A tenth of the same sums, of 16 terms below 8 in another order.
        left = [np.delete(s, EMPTY_CHANNEL) for s in (new, other)]
        np.testing.assert_allclose(*left, rtol=32 * 2.0**-24, atol=32 * 2.0**-24)
    np.testing.assert_array_equal(y[:, EMPTY_CHANNEL], 0)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("framework", MASKED)
def test_derivatives_by_statistics_and_parameters(rng, framework, x64):
    """Of y and of the new running statistics, which a loss may hold too."""
    x, mask = normal(rng, ROWS, WIDTH, dtype="float64"), empty_channel(rng)
    norm = BATCH_NORMS[framework](False, x)
    parameters, statistics = parameters_of(norm, rng)

    def loss(parameters, x):
        y, new = norm.apply(parameters, statistics, x, mask=mask)
        return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.sin(s)) for s in jax.tree.leaves(new))

    for result in derivatives(loss, parameters, x):
        for leaf in jax.tree.leaves(result):
            assert np.isfinite(leaf).all()
            np.testing.assert_array_equal(leaf[..., EMPTY_CHANNEL], 0)
            assert np.delete(leaf, EMPTY_CHANNEL, -1).any()


def test_nan_in_the_data_is_not_taken_for_nothing(rng):
    """A channel with a NaN of its own has NaN statistics, as in the framework."""
    x = normal(rng, ROWS, WIDTH).at[0, 1].set(np.nan)
    for framework in MASKED:
        norm = BATCH_NORMS[framework](False, x)
        _, after = norm.apply(*norm.init(), x, mask=np.ones((ROWS, 1), bool))
        for leaf in jax.tree.leaves(after):
            np.testing.assert_array_equal(np.isnan(leaf), np.arange(WIDTH) == 1)


# ----------------------------------------------------------------- softmax, classifier, attention


@pytest.mark.parametrize("framework", SOFTMAXES)
def test_softmax_of_nothing(rng, framework, x64):
    x = normal(rng, ROWS, WIDTH, dtype="float64")
    where = rng.random((ROWS, WIDTH)) < 0.7
    where[:, 0], where[EMPTY_ROWS] = True, False
    x = jnp.where(where, x, np.nan)
    labels = np.zeros(ROWS, int)
    layer = SOFTMAXES[framework](x, num_features=WIDTH)
    parameters = randomised(layer.init(), rng)
    np.testing.assert_array_equal(layer.apply(parameters, x, where=where)[EMPTY_ROWS], 0)
    left = np.delete(np.arange(ROWS), EMPTY_ROWS)

    def loss(rows):
        def value(parameters, x):
            options = {"where": where[rows]}
            y = layer.apply(parameters, x[rows], **options)
            each = layer.apply(parameters, x[rows], labels=labels[rows], **options)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(each))

        return value

    everything = np.arange(ROWS)
    for got, want in zip(
        *(derivatives(loss(r), parameters, x) for r in (everything, left)), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("framework", CLASSIFIERS)
def test_classes_of_nothing(rng, framework):
    """A row without classes has loss 0 and no gradient."""
    x = normal(rng, ROWS, WIDTH)
    layer = CLASSIFIERS[framework](x, "loss", num_classes=4)
    parameters = randomised(layer.init(), rng)
    where = np.ones((ROWS, 4), bool)
    where[EMPTY_ROWS] = False
    labels = jnp.zeros(ROWS, int)

    def loss(parameters, x):
        each = layer.apply(parameters, x, labels, where=where)
        return jnp.sum(jnp.sin(each)), each

    (_, each), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
    np.testing.assert_array_equal(each[EMPTY_ROWS], 0)
    np.testing.assert_array_equal(gradients[1][EMPTY_ROWS], 0)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("framework", ATTENTIONS)
@pytest.mark.parametrize("weighting", ["bias", "folded"])
def test_queries_without_keys(rng, framework, weighting):
    """They attend to all keys alike, as in jax, and weights do not move them."""
    x = normal(rng, 2, 5, 12)
    layer = ATTENTIONS[framework](x, num_positions=5, weighting=weighting)
    parameters = randomised(layer.init(), rng)
    mask = np.tri(5, dtype=bool)[None, None].copy()
    mask[..., 2, :] = False
    y = layer.apply(parameters, x, mask=mask)
    nothing = layer.apply(parameters, x, mask=np.zeros((1, 1, 5, 5), bool))
    np.testing.assert_allclose(y[:, 2], nothing[:, 2], rtol=0, atol=64 * 2.0**-24 * np.abs(y).max())

    def loss(parameters, x, mask=mask):
        return jnp.sum(jnp.sin(layer.apply(parameters, x, mask=mask)))

    for result in derivatives(loss, parameters, x):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    empty = jax.grad(lambda p: loss(p, x, np.zeros((1, 1, 5, 5), bool)))(parameters)
    np.testing.assert_array_equal(leaf_named(empty, "mode_norms"), 0)


@pytest.mark.parametrize("framework", ATTENTIONS)
@pytest.mark.parametrize("weighting", ["bias", "folded"])
def test_weights_that_are_not_finite_under_the_mask(rng, framework, weighting):
    """A padded key may have any syntony."""
    x, mask = normal(rng, 2, 5, 12), np.arange(5) < 3
    syntony = np.exp(rng.normal(size=(2, 5))).astype("float32")
    layer = ATTENTIONS[framework](
        x, mode="provided", weighting=weighting, call={"syntony": jnp.asarray(syntony)}
    )
    parameters = randomised(layer.init(), rng)

    def loss(parameters, syntony):
        return jnp.sum(jnp.sin(layer.apply(parameters, x, mask=mask, syntony=syntony)))

    padded = [np.where(mask, syntony, poison) for poison in (1.0, np.nan, np.inf)]
    want, *got = (jax.value_and_grad(loss, (0, 1))(parameters, jnp.asarray(s)) for s in padded)
    # Of all gradients: that of a key's bias is 0, the sum of terms as large as those of the others.
    scale = max(float(np.max(np.abs(b))) for b in jax.tree.leaves(want))
    for each in got:
        for a, b in zip(*map(jax.tree.leaves, (each, want)), strict=True):
            # exp makes the rounding of a logit, up to some 100 in size, one of its weight.
            np.testing.assert_allclose(a, b, rtol=0, atol=512 * 2.0**-24 * scale)
