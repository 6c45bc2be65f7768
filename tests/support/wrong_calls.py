"""Right calls of the public functions, and for every argument values that it cannot be."""

import dataclasses
import decimal
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import syntonic_jax
from syntonic_jax import _dispatch
from syntonic_jax.lattice import snap_distance

HUGE = 10**400  # beyond every floating type
STRUCTURED = np.array([(1, 2.0)], "i4,f4")


class Unhashable:
    __hash__ = None  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Opaque:
    """What jax does not know; with the method by which it once asked such things for arrays."""

    def __jax_array__(self):
        return jnp.ones((3, 4))


NO_ARRAYS = [
    *("a", b"a", [1.0, 2.0], (1.0,), {1.0}, {"x": 1.0}, range(4), object(), Opaque(), len),
    *(np.float32, [], {}, Unhashable()),
    *(np.array("a"), np.array(["a"] * 4), np.array([None] * 4), np.array([1, "a"], object)),
    *(STRUCTURED, STRUCTURED[0], np.array(1, "M8[s]"), np.zeros(4, "m8[s]")),
    np.ma.array([1.0, 2.0, 3.0, 4.0], mask=[0, 1, 0, 1]),
    jax.random.key(0),
    syntonic_jax.GoldenArray(1, 2),
]
DATA = [
    *NO_ARRAYS,
    *(1, True, 1j, HUGE, 2**40, np.int8(1), np.bool_(True), np.longdouble(1)),
    *(np.ones((3, 4), int), np.ones((3, 4), bool), np.ones((3, 4), complex)),
    *(np.ones((3, 4), "g"), jnp.ones((3, 4), "uint8"), jnp.ones((3, 4), "float8_e4m3fn")),
]
PARAMETER = [*DATA, 1.0, jnp.ones(()), np.ones(5), np.ones((1, 4)), np.ones(0)]
WHERE = [
    *NO_ARRAYS,
    *([True] * 4, [[True] * 4] * 3, [jnp.array(True)] * 4, (True, False, True, True), "yes"),
    *(1, 0, 0.5, 1.0, HUGE, np.ones((3, 4)), np.ones(4, int), jnp.ones(4), np.ones(4, complex)),
    *(np.ones(5, bool), np.ones((1, 3, 4), bool), np.ones((2, 4), bool)),
]
STATIC = [[], ["relu"], {}, {"relu"}, Unhashable(), np.array("relu"), np.array(["xla", "cuda"])]
STATIC += [jnp.array(True), jnp.ones(2), b"phi", object(), True, 1, 1.0, HUGE]
CHOICE = [*STATIC, "silu", "", "RELU", ("relu",), np.array("cuda"), np.array(None), jax.nn.relu]
DTYPE = [
    *STATIC,
    *([1], (1,), ("float32", 2), [("a", "f4")], {"names": ["a"], "formats": ["f4"]}),
    *("int32", "complex64", "bool", "nonsense", "f8,,", "(", ">f4", "O", "U1", "M8[s]", "f4,i4"),
    *(int, bool, complex, object, str, type, np.ndarray, np.floating, np.number, len),
    *(jnp.int32, jnp.float8_e4m3fn, jnp.float32(1), np.float32(1), np.ones(2), STRUCTURED),
    *(STRUCTURED.dtype, jax.random.key(0), jax.random.key(0).dtype, 3.5, 1j),
]
FINITE = [
    *("1", b"1", "nan", None, [1.0], (1.0,), {}, 1j, True, np.bool_(True), object(), Unhashable()),
    *(HUGE, -HUGE, float("nan"), float("inf"), -float("inf"), np.float32("nan")),
    *(np.longdouble("1e4000"), decimal.Decimal(1), np.array([1.0]), np.array("1")),
    *(jnp.ones(2), jnp.ones(1), np.array(None), np.array(1j), np.array(True)),
    *(jnp.array(True), jnp.array(jnp.inf), STRUCTURED, jax.random.key(0), np.ma.array([1.0])),
]
NUMBER = [*FINITE, -1.0, -1, np.float16(-1), np.array(-1.0)]  # not negative
POSITIVE = [*NUMBER, 0, 0.0, "silver", "phi", ["golden"], {"golden"}, np.array("golden")]
AXIS = [
    *(1.0, True, "1", "last", b"", None, {}, [], (), [0], (0,), 1j, object(), Unhashable()),
    *(2, -3, HUGE, -HUGE, np.float32(1), np.bool_(True), np.array(1.0), np.array([1]), jnp.ones(2)),
    *(np.array(True), jnp.array(True), jnp.array(1.0), np.array("1"), np.array(None), range(2)),
]
AXES = [
    *(v for v in AXIS if type(v) not in (list, tuple, range) and np.shape(v) != (1,)),
    *([[0]], (0, 0), (0, -2), (0, 2), [0, 1.0], ("0",), (None,), (True,), [HUGE], (0, [1])),
]
AXES.append(np.array([0.0, 1.0]))
SCALAR = [*NO_ARRAYS, None, True, 1j, HUGE, np.ones(1), np.ones((3, 4)), np.array(True)]
SCALAR += [np.bool_(True), np.array("1"), -HUGE, jnp.array(1)]
FLAG = [None, 1, 0, 1.0, "no", "", "yes", [], [True], {}, np.array(True), np.array([True])]
FLAG += [jnp.array(True), jnp.array(0), np.int8(1), HUGE, object(), Unhashable(), b"", 1j]
LABELS = [
    *NO_ARRAYS,
    *(None, 0, 1, 2**40, HUGE, True, 0.5, np.ones(3), np.ones(3, bool), [0, 1, 2], (0, 1, 2)),
    *(np.zeros(4, int), np.zeros((3, 4), int), np.array(0), np.ones(3, complex), np.zeros(0, int)),
]
NAME = [3, 0, True, np.int64(3), ("batch", 3), [["batch"]], ["batch", ["model"]], {"batch"}, {}]
NAME += [
    (True,),
    np.array("batch"),
    np.array(["batch"]),
    jnp.array(0),
    Unhashable(),
    [Unhashable()],
]
GROUPS = [
    *(5, (0, 1), "ab", [["a", "b"]], [[0.0, 1.0]], [[0, 1], 2], [[True, False]], object(), True),
    *([[0, [1]]], [[None]], np.zeros(2, int), np.zeros((1, 2)), ["ab"], jnp.ones(())),
]
PRECISION = [0, -1, 2**21, HUGE, 1.0, True, "1", None, [1], {}, np.array([1]), np.array(1.0), 1j]
PRECISION += [jnp.array(1.0), jnp.ones(2), np.bool_(True), np.array("1"), object(), Unhashable()]

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
ROWS = [*DATA, None]

# What an argument cannot be, by its name, and arrays for those of a right call.
WRONG = {
    **dict.fromkeys(["x", "identity", "residual"], ROWS),
    **dict.fromkeys(["scale", "bias"], PARAMETER),
    "mean": [*PARAMETER, None],
    "var": [*PARAMETER, None],
    **dict.fromkeys(["activation", "implementation"], CHOICE),
    "mode": [*CHOICE, None],
    "axis": AXES,
    "where": WHERE,
    "axis_name": NAME,
    "axis_index_groups": GROUPS,
    "target_variance": POSITIVE,
    "epsilon": NUMBER,
    "scale_offset": FINITE,
    "precision": PRECISION,
    "return_sum": FLAG,
    "dtype": DTYPE,
}
RIGHT = {"identity": X, "residual": X, "x": X, "where": X > -0.5, "return_sum": True}
RIGHT |= {"mean": X[0], "var": X[1] ** 2, "scale": X[1], "bias": X[2]}
# And where an argument of a function is another than its name says.
NOT_EMPTY = {"axis": [*AXES, ()]}  # of a norm, which needs some to reduce
OTHERWISE: dict[str, dict[str, list[Any]]] = {
    "golden_layer_norm": NOT_EMPTY,
    "golden_rms_norm": NOT_EMPTY,
}

# Of each function: the arrays of a right call, and for each argument what it cannot be.
CALLS: dict[str, list[tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]]] = {}


def calls(function, right, wrong):
    CALLS.setdefault(function.__name__, []).append((function, right, wrong))


CLASSES = {"mode_norms": X[0], "where": X > -0.5}
SYNTONY = {"syntony": X[0], "where": X > -0.5}
WEIGHTS = {"scale": SCALAR, "axis": AXIS, "where": WHERE, "implementation": CHOICE}
for function in (syntonic_jax.syntonic_softmax, syntonic_jax.syntonic_log_softmax):
    calls(function, {"x": X} | CLASSES, {"x": [*DATA, None], "mode_norms": PARAMETER})
    calls(function, {"x": X} | SYNTONY, {"syntony": [*DATA, np.ones(5), np.ones((1, 3, 4))]})
    calls(function, {"x": X} | SYNTONY, {"dtype": DTYPE} | WEIGHTS)
LOSS = {"logits": X, "labels": jnp.array([0, 1, 3])}
calls(
    syntonic_jax.syntonic_cross_entropy,
    LOSS | CLASSES,
    {"logits": [*DATA, None], "mode_norms": PARAMETER, "labels": LABELS}
    | {"ignore_index": [v for v in AXIS if v is not None and type(v) is not int]}
    | WEIGHTS,
)
calls(
    syntonic_jax.syntonic_cross_entropy,
    LOSS | SYNTONY,
    {"syntony": [*DATA, np.ones(5), np.ones((1, 3, 4))]},
)

for function in [getattr(syntonic_jax, name) for name in _dispatch.OPERATIONS] + [snap_distance]:
    if function.__name__ not in CALLS:
        names = inspect.signature(function).parameters
        wrong = {name: WRONG[name] for name in names} | OTHERWISE.get(function.__name__, {})
        calls(function, {name: RIGHT[name] for name in names if name in RIGHT}, wrong)
