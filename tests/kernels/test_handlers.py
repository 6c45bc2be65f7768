"""The handlers trust nothing: each wrong buffer or attribute ends in an FFI error that names it.

Run on the CPU double, whose handlers are those of the CUDA extension.
"""

import double
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handler_calls import CALLS, EXTRA, PARAMETER, WRONG, floats


def number(value):
    """Attributes are float64 and int32, whatever Python calls them."""
    return np.float64(value) if isinstance(value, float) else np.int32(value)


def changed(target, changes):
    """The right call of `target` with `changes` made to it."""
    operands, results, attributes = (
        {name: changes.get(name, value) for name, value in part.items()} for part in CALLS[target]
    )
    operands |= {name: changes[name] for name in (EXTRA, "y") if name in changes.keys() - results}
    return tuple(
        {name: value for name, value in part.items() if value is not None}
        for part in (operands, results, attributes)
    )


def counting(array):
    """1, 2, …; labels stay classes."""
    most = 4 if array.dtype == jnp.int32 else array.size + 1
    values = jnp.arange(1, 1 + array.size, dtype="float32") % most
    return values.reshape(array.shape).astype(array.dtype)


def run(target, operands, results, attributes, wrong=None):
    """Calls the double with operands counting up from 1; returns {result: array}.

    `wrong` are attributes by which a handler finds its arrays, where they are not right.
    """
    call = jax.ffi.ffi_call(f"syntonic_{target}", tuple(results.values()))
    arrays = [
        array if isinstance(array, jax.Array) else counting(array) for array in operands.values()
    ]
    attributes = {name: number(value) for name, value in attributes.items()}
    names = {"operands": " ".join(operands), "results": " ".join(results)}
    names |= wrong or {}
    values = call(*arrays, **attributes, **names)
    return dict(zip(results, jax.block_until_ready(values), strict=True))


@pytest.fixture(autouse=True, scope="module")
def registered():
    double.register()
    double.register(spare_elements=1, suffix="_shifted")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def is_scratch(name):
    return name == "scratch"


@pytest.mark.parametrize("target", CALLS)
def test_right_call_fills_every_result(target):
    for name, value in run(target, *CALLS[target]).items():
        assert is_scratch(name) or np.isfinite(value).all(), name


@pytest.mark.parametrize(
    ("target", "changes", "message"), WRONG, ids=[f"{t}-{'-'.join(c)}" for t, c, _ in WRONG]
)
def test_wrong_call_is_refused(target, changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT: .*{message}"):
        run(target, *changed(target, changes))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"operands": "identity"}, "names 1 operands, got 2"),
        ({"results": "y z statistics"}, "names 3 results, got 2"),
        ({"operands": "identity bias"}, "operand residual is missing"),
        ({"operands": "identity identity"}, "operand residual is missing"),
        ({"operands": ""}, "names 0 operands, got 2"),
        ({"results": "y x"}, "has no result x"),
        ({"results": "z x"}, "result y is missing"),
    ],
)
def test_wrong_names_are_refused(names, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT: .*{message}"):
        run("phi_residual", *CALLS["phi_residual"], names)


def test_arrays_are_found_by_name():
    """In whatever order they come, which the numbers tell apart."""
    operands, results, attributes = CALLS["phi_residual"]
    given = {name: (i - 2) * counting(x) for i, (name, x) in enumerate(operands.items())}
    expected = run("phi_residual", given, results, attributes)
    assert not np.allclose(expected["y"], expected["z"])
    reordered = dict(reversed(given.items())), dict(reversed(results.items()))
    found = run("phi_residual", *reordered, attributes)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("target", CALLS)
def test_empty_call_succeeds_with_zero_sums(target):
    def emptied(part):
        return {
            name: floats(0, *array.shape[1:], dtype=array.dtype) if array.shape[0] == 6 else array
            for name, array in part.items()
        }

    operands, results, attributes = CALLS[target]
    for name, value in run(target, emptied(operands), emptied(results), attributes).items():
        assert is_scratch(name) or not value.any(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("target", CALLS)
def test_spare_element_shifts_every_array(target, dtype):
    """The build for misaligned pointers works on arrays that begin at their second element."""
    acc = "float64" if dtype == "float64" else "float32"
    in_acc = {
        "mean",
        "statistics",
        "slope",
        "shift",
        "scale",
        "bias",
        "d_scale",
        "d_bias",
        "sums",
        "scratch",
    }
    in_acc |= {"low", "var", "sum", "product", "max", "log_sum", "loss"}
    in_acc |= {"first", "second"}
    if target == "cross_entropy_cotangent":
        in_acc.add("ct_loss")

    def retyped(part):
        return {
            name: floats(*array.shape, dtype=acc if name in in_acc else dtype)
            if array.dtype == jnp.float32
            else array
            for name, array in part.items()
        }

    operands, results, attributes = CALLS[target]
    operands, results = retyped(operands), retyped(results)
    # Parameters are a row each, so that there is a first dimension to be longer by one.
    operands |= {
        name: floats(1, *array.shape, dtype=acc)
        for name, array in operands.items()
        if name in {"scale", "bias"} and array.shape == PARAMETER.shape
    }

    def longer(array):
        return floats(array.shape[0] + 1, *array.shape[1:], dtype=array.dtype)

    def within(flat, array):
        return flat.reshape(-1)[1 : 1 + array.size].reshape(array.shape)

    padded = {
        name: jnp.linspace(-2, 2, longer(array).size).astype(array.dtype).reshape(-1)
        for name, array in operands.items()
    }
    expected = run(
        target, {n: within(padded[n], a) for n, a in operands.items()}, results, attributes
    )
    shifted = run(
        f"{target}_shifted",
        {n: padded[n].reshape(longer(a).shape) for n, a in operands.items()},
        {n: longer(a) for n, a in results.items()},
        attributes,
    )
    for name, array in results.items():
        if not is_scratch(name):
            np.testing.assert_array_equal(within(shifted[name], array), expected[name])
