"""Arguments of layers: what jnp takes is taken, and nothing counts as true in silence.

An error is a TypeError or ValueError that names the layer and the argument.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from layer_contract import described, normal, randomised
from norm_layers import BATCH_NORMS, LAYER_NORMS, Norm
from residual_layers import WIDTH, X, residual, residual_norm
from softmax_layers import ATTENTIONS, CLASSIFIERS, SOFTMAXES

import syntonic_jax.nn
from syntonic_jax import GoldenNormMode, phi_residual

ROWS = len(X)
MASKED = ("nnx", "linen")  # Haiku's norms have no mask
FRAMEWORKS = tuple(BATCH_NORMS)


def refused(error, layer, argument, function):
    """The error names both; what it says of the argument may be the operation's."""
    with pytest.raises(error, match=rf"^{layer}: {argument}"):
        function()


# ---------------------------------------------------------------------------------------- masks

NO_MASKS = {
    "text": "a",
    "number": 0.5,
    "numpy number": np.float32(0.5),
    "one": 1,
    "list": [True] * WIDTH,
    "texts": np.array(["a"] * WIDTH),
    "objects": np.array([True] * WIDTH, object),
    "complex": np.ones(WIDTH, complex),
    "record": np.zeros(WIDTH, [("a", bool)]),
}


@pytest.mark.parametrize("what", NO_MASKS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_no_mask(framework, what):
    mask = NO_MASKS[what]
    if framework in MASKED:
        for layer, norms in (("GoldenBatchNorm", BATCH_NORMS), ("GoldenLayerNorm", LAYER_NORMS)):
            norm = norms[framework](False, X)
            variables = norm.init()
            for train in (True, False):
                call = lambda n=norm, v=variables, t=train: n.apply(*v, X, t, mask=mask)  # noqa: E731
                refused(TypeError, layer, "mask must be an array", call)
    attention = ATTENTIONS[framework](X)
    parameters = attention.init()
    refused(
        TypeError,
        "SyntonicAttention",
        "mask must be an array",
        lambda: attention.apply(parameters, X, mask=mask),
    )


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32"])
def test_masks_of_numbers(rng, framework, dtype):
    """Not 0 is true, as in Linen, whose masks may be of any of these."""
    mask = rng.integers(-1, 2, size=(ROWS, WIDTH))
    mask[:2] = [[1] * WIDTH, [-1] * WIDTH]
    mask = jnp.asarray(np.abs(mask) if dtype == "uint32" else mask, dtype)
    for norms in (BATCH_NORMS, LAYER_NORMS):
        norm = norms[framework](False, X, target_variance="standard")
        variables = norm.init()
        got, want = (norm.apply(*variables, X, mask=m) for m in (mask, mask != 0))
        assert described(got) == described(want)
        theirs = norms["linen"](True, X)
        y, _ = theirs.apply(*theirs.init(), X, mask=mask)
        kept = np.broadcast_to(np.asarray(mask != 0).any(1, keepdims=True), X.shape)
        np.testing.assert_allclose(
            np.where(kept, got[0], 0), np.where(kept, y, 0), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("framework", MASKED)
@pytest.mark.parametrize("mask", [True, np.True_, np.ones((), bool), np.ones(1)])
def test_a_mask_that_leaves_everything(framework, mask):
    norm = BATCH_NORMS[framework](False, X)
    got, want = (norm.apply(*norm.init(), X, mask=m) for m in (mask, np.ones(X.shape, bool)))
    assert described(got) == described(want)


# ---------------------------------------------------------------------------------------- flags

NO_FLAGS = ["no", 2, [True], jnp.ones(2, bool)]


@pytest.mark.parametrize("value", NO_FLAGS, ids=str)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_neither_true_nor_false(framework, value):
    haiku = framework == "haiku"
    scale, bias = ("create_scale", "create_offset") if haiku else ("use_scale", "use_bias")
    for name, argument in ((scale, "use_scale"), (bias, "use_bias")):
        for layer, norms in (("GoldenBatchNorm", BATCH_NORMS), ("GoldenLayerNorm", LAYER_NORMS)):
            build = lambda n=norms, a=argument: n[framework](False, X, **{a: value}).init()  # noqa: E731
            refused(TypeError, layer, f"{name} must be True or False", build)
        build = lambda n=name: residual_norm(framework, **{n: value}).init()  # noqa: E731
        refused(TypeError, "PhiResidualLayerNorm", f"{name} must be True or False", build)
    build = lambda: residual_norm(framework, return_sum=value).init()  # noqa: E731
    refused(TypeError, "PhiResidualLayerNorm", "return_sum must be True or False", build)

    norm = BATCH_NORMS[framework](False, X)
    variables = norm.init()
    if haiku:
        call = lambda: norm.apply(*variables, X, value)  # noqa: E731
        refused(TypeError, "GoldenBatchNorm", "is_training must be True or False", call)
        call = lambda: norm.apply(*variables, X, False, test_local_stats=value)  # noqa: E731
        refused(TypeError, "GoldenBatchNorm", "test_local_stats must be True or False", call)

    use = "with_bias" if haiku else "use_bias"
    build = lambda: CLASSIFIERS[framework](X, num_classes=3, **{use: value}).init()  # noqa: E731
    refused(TypeError, "SyntonicClassifier", f"{use} must be True or False", build)
    build = lambda: ATTENTIONS[framework](X, **{use: value}).init()  # noqa: E731
    refused(TypeError, "SyntonicAttention", f"{use} must be True or False", build)
    attention = ATTENTIONS[framework](X)
    parameters = attention.init()
    call = lambda: attention.apply(parameters, X, is_causal=value)  # noqa: E731
    refused(TypeError, "SyntonicAttention", "is_causal must be True or False", call)


@pytest.mark.parametrize("value", ["no", 2, [True]], ids=str)
def test_what_says_neither_training_nor_evaluation(value):
    norm = syntonic_jax.nn.nnx.GoldenBatchNorm(WIDTH, rngs=nnx.Rngs(0))
    message = "use_running_average must be True or False"
    call = lambda: norm(X, use_running_average=value)  # noqa: E731
    refused(TypeError, "GoldenBatchNorm", message, call)
    norm = syntonic_jax.nn.linen.GoldenBatchNorm(use_running_average=value)
    refused(TypeError, "GoldenBatchNorm", message, lambda: norm.init(jax.random.key(0), X))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("true", [True, np.True_, 1, np.array(True), jnp.array(True)], ids=repr)
def test_what_is_true(framework, true):
    layers = [residual_norm(framework, return_sum=flag) for flag in (true, True)]
    got, want = (layer.apply(layer.init(), X, X) for layer in layers)
    np.testing.assert_array_equal(got, want)
    attention = ATTENTIONS[framework](X)
    parameters = attention.init()
    got, want = (attention.apply(parameters, X, is_causal=flag) for flag in (true, True))
    np.testing.assert_array_equal(got, want)


# --------------------------------------------------------------------------- numbers and names


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_numbers_of_numpy(rng, framework):
    """As numbers of Python, to the last bit: static, they are rounded to nothing narrower."""
    x = normal(rng, 3, ROWS, WIDTH)
    axes = {"reduction_axes": (1, 2), "feature_axes": 2}
    for norms, python, numpy in (
        (
            BATCH_NORMS,
            {"momentum": 0.5, "epsilon": 0.25, "target_variance": 2.0},
            {
                "momentum": np.float32(0.5),
                "epsilon": np.float16(0.25),
                "target_variance": np.float32(2),
            },
        ),
        (
            LAYER_NORMS,
            {"epsilon": 0.25, "target_variance": 2.0, **axes},
            {
                "epsilon": np.float64(0.25),
                "target_variance": np.int64(2),
                "reduction_axes": np.array([1, 2]),
                "feature_axes": np.int64(2),
            },
        ),
    ):
        results = []
        for options in (python, numpy):
            if framework == "nnx":  # where arrays are no settings
                options = {
                    k: tuple(v) if isinstance(v, np.ndarray) else v for k, v in options.items()
                }
            norm = norms[framework](False, x, **options)
            results.append(norm.apply(*norm.init(), x))
        assert described(results[0]) == described(results[1])
    softmax = [
        SOFTMAXES[framework](x, num_features=n, axis=a, scale=s)
        for n, a, s in ((WIDTH, -1, 0.5), (np.int64(WIDTH), np.int64(-1), np.float32(0.5)))
    ]
    got, want = (layer.apply(layer.init(), x) for layer in softmax)
    np.testing.assert_array_equal(got, want)
    attention = [
        ATTENTIONS[framework](x, num_positions=n, scale=s)
        for n, s in ((ROWS, 0.5), (np.int64(ROWS), np.float32(0.5)))
    ]
    got, want = (layer.apply(layer.init(), x) for layer in attention)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("name", "number"), [("golden", None), ("standard", 1.0), (None, 2.0)])
def test_modes_of_norms(framework, name, number):
    """GoldenNormMode in every layer that has a target variance, under jit too."""
    mode = GoldenNormMode.custom(number) if name is None else GoldenNormMode(name)
    for norms in (BATCH_NORMS, LAYER_NORMS):
        results = []
        for target in (mode, name or number):
            norm = norms[framework](False, X, target_variance=target)
            results.append(jax.jit(norm.apply)(*norm.init(), X)[0])
        np.testing.assert_array_equal(*results)
    layers = [residual_norm(framework, target_variance=t) for t in (mode, name or number)]
    np.testing.assert_array_equal(*(layer.apply(layer.init(), X, X) for layer in layers))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("activation", ["silu", ["relu"], 1, "Relu"], ids=str)
def test_an_unknown_activation_is_refused_when_built(framework, activation):
    """Before the block is called, or anything of it made."""

    def block(x):
        raise AssertionError("called")

    def build():
        if framework == "linen":
            return syntonic_jax.nn.linen.PhiResidual(block, activation=activation)
        return residual(framework, block, activation=activation).init()

    refused(ValueError, "PhiResidual", "activation must be None, 'relu'", build)
    known = residual(framework, jnp.sin, activation="relu")
    np.testing.assert_array_equal(
        known.apply(known.init(), X), phi_residual(X, jnp.sin(X), activation="relu")
    )


def test_linen_checks_when_built():
    """Names and flags of what is called later."""
    layers = syntonic_jax.nn.linen
    for error, layer, argument, options in (
        (ValueError, "PhiResidual", "mode", {"module": jnp.sin, "mode": "golden"}),
        (ValueError, "PhiResidualLayerNorm", "mode", {"mode": "golden"}),
        (TypeError, "PhiResidualLayerNorm", "return_sum", {"return_sum": "no"}),
    ):
        refused(error, layer, argument, lambda n=layer, o=options: getattr(layers, n)(**o))
    assert isinstance(layers.PhiResidual(jnp.sin).clone(), linen.Module)


def nnx_along(theirs, x, *, axis):
    """A batch norm whose number of features does not come of the axis."""
    layer = syntonic_jax.nn.nnx.GoldenBatchNorm(WIDTH, axis=axis, rngs=nnx.Rngs(0))
    return Norm(lambda: ({}, {}), lambda parameters, statistics, x: layer(x))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_other_wrong_arguments(framework):
    haiku = framework == "haiku"
    decay = "decay_rate" if haiku else "momentum"
    batch, layer, softmax, attention = (
        made[framework] for made in (BATCH_NORMS, LAYER_NORMS, SOFTMAXES, ATTENTIONS)
    )

    def norm(made, x=X, **options):
        def call():
            built = made(False, X, **options)
            return built.apply(*built.init(), x)

        return call

    def applied(made, x=X, call=None, **options):
        def run():
            built = made(X, call=call, **options)
            return built.apply(built.init(), x, **(call or {}))

        return run

    data = "inputs" if haiku else "x"
    axes, sizes = "axis" if haiku else "reduction_axes", "must be an integer"
    cases = [
        (TypeError, "GoldenBatchNorm", f"{decay} must be", norm(batch, momentum="a")),
        (TypeError, "GoldenBatchNorm", f"{data} must be an array", norm(batch, x="a")),
        (
            TypeError,
            "GoldenLayerNorm",
            f"{axes} must be an integer",
            norm(layer, reduction_axes="a"),
        ),
        (TypeError, "GoldenLayerNorm", f"{data} must be an array", norm(layer, x=[1.0, 2.0])),
        (TypeError, "SyntonicSoftmax", "axis must be an integer", applied(softmax, axis="a")),
        (TypeError, "SyntonicSoftmax", f"num_features {sizes}", applied(softmax, num_features="a")),
        (TypeError, "SyntonicSoftmax", "x must be an array", applied(softmax, x="a")),
        (TypeError, "SyntonicAttention", f"num_heads {sizes}", applied(attention, heads=3.0)),
        (ValueError, "SyntonicAttention", "num_heads must be at", applied(attention, heads=0)),
        (ValueError, "SyntonicAttention", "num_positions", applied(attention, num_positions=0)),
        (TypeError, "SyntonicAttention", "scale must be", applied(attention, scale="a")),
        (
            ValueError,
            "SyntonicAttention",
            "implementation must be None, 'xla' or 'cudnn', got 'a'",
            applied(attention, implementation="a"),
        ),
        (
            TypeError,
            "SyntonicAttention",
            "syntony must be an array, got str",
            applied(attention, mode="provided", call={"syntony": "a"}),
        ),
    ]
    for error, name, argument, function in cases:
        if "heads" in argument and haiku:
            continue  # the size of a head is given there, and has no remainder
        refused(error, name, argument, function)
    for axis in (["a"], [1.0], [True], "a"):
        made = batch if framework != "nnx" else nnx_along
        refused(TypeError, "GoldenBatchNorm", "axis must be an integer", norm(made, axis=axis))
    built = residual_norm(framework)
    parameters = randomised(built.init(), np.random.default_rng(0))
    for arrays, name in ((("a", X), "identity"), ((X, "a"), "residual")):
        call = lambda a=arrays: built.apply(parameters, *a)  # noqa: E731
        refused(TypeError, "PhiResidualLayerNorm", f"{name} must be an array", call)


# ----------------------------------------------------------------------------- types and sizes

NO_TYPES = ["bogus", object(), ["a"], "O"]
NO_SIZES = {"none": None, "text": "a", "huge": 10**400, "beyond": 2**63, "zero": 0}


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
@pytest.mark.parametrize("value", NO_TYPES, ids=["name", "object", "list", "objects"])
@pytest.mark.parametrize("framework", MASKED)  # Haiku's layers have neither
def test_what_is_no_type(framework, argument, value):
    options, pattern = {argument: value}, f"{argument} must be a dtype of numbers, got"

    def norm(norms):
        made = norms[framework](False, X, **options)
        return made.apply(*made.init(), X)

    refused(TypeError, "GoldenBatchNorm", pattern, lambda: norm(BATCH_NORMS))
    refused(TypeError, "GoldenLayerNorm", pattern, lambda: norm(LAYER_NORMS))
    for name, layers in (
        ("SyntonicSoftmax", SOFTMAXES),
        ("SyntonicClassifier", CLASSIFIERS),
        ("SyntonicAttention", ATTENTIONS),
    ):
        more = {"num_classes": 5} if name == "SyntonicClassifier" else {}
        build = lambda b=layers[framework], m=more: b(X, **options, **m).init()  # noqa: E731
        refused(TypeError, name, pattern, build)


@pytest.mark.parametrize("what", NO_SIZES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_no_size(framework, what):
    """None stands for the length of x where a size may be left out."""
    value = NO_SIZES[what]
    for layer, argument, layers in (
        ("SyntonicClassifier", "num_classes", CLASSIFIERS),
        ("SyntonicAttention", "num_positions", ATTENTIONS),
    ):
        if value is None and argument == "num_positions":
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{layer}: {argument} must be"):
            layers[framework](X, **{argument: value}).init()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("layer", "layers", "argument"),
    [
        ("SyntonicSoftmax", SOFTMAXES, "mode"),
        ("SyntonicSoftmax", SOFTMAXES, "mode_norms_init"),
        ("SyntonicAttention", ATTENTIONS, "mode"),
        ("SyntonicAttention", ATTENTIONS, "weighting"),
        ("SyntonicAttention", ATTENTIONS, "implementation"),
    ],
    ids=["softmax", "init", "attention", "weighting", "implementation"],
)
@pytest.mark.parametrize("value", [np.ones(3), [1], {}], ids=["array", "list", "dict"])
def test_what_is_no_name(framework, layer, layers, argument, value):
    with pytest.raises(ValueError, match=f"^{layer}: {argument} must be"):
        layers[framework](X, **{argument: value}).init()
