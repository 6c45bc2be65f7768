"""Wrong calls of the public functions, every argument of each with values that it cannot be.

Each raises a TypeError or a ValueError that names the function and the argument, however it is
called: not what jax says of its own, and never a result.
"""

import inspect

import jax
import jax.numpy as jnp
import pytest
from wrong_calls import CALLS, POSITIVE, X

import syntonic_jax

EACH = [
    (function, right, argument, values)
    for entries in CALLS.values()
    for function, right, wrong in entries
    for argument, values in wrong.items()
]


def eagerly(call, arrays):
    return call(arrays)


def jitted(call, arrays):
    return jax.jit(call)(arrays)


def mapped(call, arrays):
    return jax.vmap(call)(jax.tree.map(lambda x: jnp.stack([x, x]), arrays))


def unjitted(call, arrays):
    with jax.disable_jit():
        return call(arrays)


WAYS = (eagerly, jitted, mapped, unjitted)
TRANSFORMED = {jitted: 0, mapped: 1}
JAX_SAYS = ("Non-hashable static", "Error interpreting", "not a valid JAX type", "An overflow was")


def complaint(way, function, right, argument, value) -> str | None:
    """What is wrong with the error of a wrong call; None if nothing is."""
    arrays = {k: v for k, v in right.items() if k != argument and isinstance(v, jax.Array)}
    others = {k: v for k, v in right.items() if k != argument and k not in arrays}

    def call(arrays):
        return function(**arrays[0], **others, **{argument: value})

    try:
        result = way(call, (arrays, X))
    except Exception as error:
        kind, message = type(error), str(error)
        causes = list(before(error))
    else:
        return f"{value!r}: no error, but {jax.tree.map(jnp.shape, result)}"
    if not issubclass(kind, TypeError | ValueError):
        return f"{value!r}: {kind.__name__}: {message}"
    first, _, rest = message.partition(": ")
    if first != function.__name__ or argument not in rest.split(" must")[0]:
        return f"{value!r}: names {first} instead: {message}"
    found = [cause for cause in causes if any(words in str(cause) for words in JAX_SAYS)]
    return f"{value!r}: shows an error of jax, too: {found}" if found else None


def before(error: BaseException | None):
    """The exceptions that a traceback shows before this one."""
    while error is not None:
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if error is not None:
            yield error


@pytest.mark.parametrize(
    ("function", "right", "argument", "values"),
    [pytest.param(*each, id=f"{each[0].__name__}-{each[2]}") for each in EACH],
)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_wrong_values(way, function, right, argument, values):
    function(**right)  # to jit's cache, 1 and 1.0 are the same as True
    # Under a transformation every argument meets a third of the values, another in each: they
    # take the same way to the same checks, and it is slow to build.
    values = values[TRANSFORMED[way] :: 3] if way in TRANSFORMED else values
    found = [complaint(way, function, right, argument, value) for value in values]
    assert [c for c in found if c] == []


def test_no_argument_is_left_out():
    functions = {
        name for name in syntonic_jax.__all__ if inspect.isfunction(getattr(syntonic_jax, name))
    }
    assert functions | {"snap_distance"} == set(CALLS)
    for name, entries in CALLS.items():
        tried = {argument for _, _, wrong in entries for argument in wrong}
        assert tried == set(inspect.signature(entries[0][0]).parameters), name


def test_traced_values_of_what_is_static():
    norms = (syntonic_jax.golden_layer_norm, syntonic_jax.golden_batch_norm)
    for f in norms:
        for argument in ("epsilon", "target_variance", "axis"):
            with pytest.raises((TypeError, ValueError), match=rf"{f.__name__}: {argument} must be"):
                jax.jit(lambda value, f=f, a=argument: f(X, **{a: value}))(1)
    with pytest.raises(TypeError, match="syntonic_softmax: axis must be an integer"):
        jax.jit(lambda axis: syntonic_jax.syntonic_softmax(X, axis=axis))(0)
    with pytest.raises(TypeError, match="phi_residual_layernorm: return_sum must be True or False"):
        jax.jit(lambda flag: syntonic_jax.phi_residual_layernorm(X, X, return_sum=flag))(True)


@pytest.mark.parametrize(
    "groups", [[[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 3], [4, 5]], [[]], [], [[0, -1]]]
)
def test_index_groups_that_do_not_cover_the_axis(groups):
    def f(x):
        return syntonic_jax.golden_batch_norm(x, axis_name="b", axis_index_groups=groups)

    pattern = r"golden_batch_norm: axis_index_groups must hold each index .*0 to 3, got "
    for mapped in (jax.pmap(f, axis_name="b"), jax.vmap(f, axis_name="b")):
        with pytest.raises(ValueError, match=pattern):
            mapped(jnp.stack([X] * 4))


def test_errors_of_the_function_itself_pass_unchanged():
    """What is raised where the body is traced is raised once, with its own type and cause."""
    with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
        syntonic_jax.phi_residual(X, X.astype("bfloat16"))
    with pytest.raises(NameError, match=r"golden_batch_norm: axis_name .*'rows'") as caught:
        syntonic_jax.golden_batch_norm(X, axis_name="rows")
    assert isinstance(caught.value.__cause__, NameError)
    with pytest.raises(
        ValueError, match="identity and residual must have the same shape"
    ) as caught:
        syntonic_jax.phi_residual(X, X[0])
    assert list(before(caught.value)) == []


def test_names_of_a_custom_mode():
    for wrong in [*POSITIVE, "golden", "standard"]:
        with pytest.raises(ValueError, match=r"^GoldenNormMode.custom: target_variance must be"):
            syntonic_jax.GoldenNormMode.custom(wrong)
