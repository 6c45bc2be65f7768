"""Operations and their formulas in jnp, for meshes with explicit axes (test_explicit_meshes.py)."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import battery
import jax
import jax.numpy as jnp
import operations
import softmax_cases

from syntonic_jax import (
    PHI_INV,
    GoldenArray,
    crystallize,
    golden_gelu,
    golden_layer_norm,
    lattice,
    phi_residual,
    residual_component_norm,
    syntonic_cross_entropy,
    syntonic_log_softmax,
    syntonic_softmax,
)


@dataclasses.dataclass(frozen=True)
class Operation:
    label: str
    call: Callable[..., Any]  # of operands and, where there are two lowerings, implementation
    formula: Callable[..., Any]  # of the same operands
    shapes: Sequence[tuple[int, ...]]
    dtypes: str = ""  # f, i or b for each operand: all f

    @property
    def types(self) -> list[str]:
        names = {"f": "float32", "i": "int32", "b": "bool"}
        return [names[t] for t in self.dtypes or "f" * len(self.shapes)]

    @property
    def argnums(self) -> tuple[int, ...]:
        return tuple(i for i, t in enumerate(self.types) if t == "float32")


# --- the formulas ---------------------------------------------------------------------------------


def beside(x, axes):
    """The axes of an array that a parameter, which has `axes`, has not."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    return tuple(i for i in range(x.ndim) if i not in [a % x.ndim for a in axes])


def layer_norm(x, scale=None, bias=None, *, axis=-1):
    variance = jnp.square(x - x.mean(axis, keepdims=True)).mean(axis, keepdims=True)
    y = PHI_INV**0.5 * (x - x.mean(axis, keepdims=True)) * jax.lax.rsqrt(variance + 1e-5)
    if scale is not None:
        y = y * jnp.expand_dims(scale, beside(x, axis))
    return y if bias is None else y + jnp.expand_dims(bias, beside(x, axis))


def weighted(x, norms=None, syntony=None, axis=-1):
    if norms is not None:
        return x - PHI_INV * jnp.expand_dims(norms, beside(x, axis))
    return x if syntony is None else x + jnp.log(jnp.maximum(syntony, 1e-10))


def entropy(x, labels, norms=None, *, axis):
    chosen = jax.nn.one_hot(labels, x.shape[axis], axis=axis, dtype=x.dtype)
    return -(chosen * jax.nn.log_softmax(weighted(x, norms, axis=axis), axis)).sum(axis)


# --- the operations -------------------------------------------------------------------------------

ROWS, SHAPE = (6, 4), (6, 4, 2)


def elementwise():
    for activation, formula in {
        None: lambda z: z,
        "relu": jax.nn.relu,
        "gelu": jax.nn.gelu,
    }.items():
        yield Operation(
            f"phi_residual {activation}",
            functools.partial(phi_residual, activation=activation),
            lambda i, r, formula=formula: formula(i + PHI_INV * r),
            [ROWS, ROWS],
        )
    yield Operation("golden_gelu", golden_gelu, lambda x: x * jax.nn.sigmoid(x), [ROWS])
    yield Operation("crystallize", crystallize, lambda x: x, [ROWS])
    yield Operation("snap_distance", lattice.snap_distance, jnp.abs, [ROWS])
    yield Operation("norm", residual_component_norm, lambda x: jnp.sqrt((x * x).sum()), [SHAPE])


def norms():
    """Over the last axis as in the list of operations, and over any axes."""
    for operation in operations.OPERATIONS:
        if operation.along == "rows" and operation.name not in softmax_cases.FUNCTIONS:
            shapes = [ROWS if kind == "rows" else ROWS[1:] for kind in operation.kinds]
            yield Operation(operation.label, operation.call, operation.reference, shapes)
    for count in (1, 2, 3):
        for axis in itertools.combinations(range(3), count):
            parameter = tuple(SHAPE[a] for a in axis)
            yield Operation(
                f"golden_layer_norm {axis}",
                functools.partial(golden_layer_norm, axis=axis),
                functools.partial(layer_norm, axis=axis),
                [SHAPE, parameter, parameter],
            )


def softmaxes():
    kinds = {"softmax": (syntonic_softmax, jax.nn.softmax)}
    kinds["log_softmax"] = (syntonic_log_softmax, jax.nn.log_softmax)
    for (name, (f, plain)), axis in itertools.product(kinds.items(), range(3)):

        def operation(label, call, formula, *shapes, dtypes="", name=name, axis=axis):
            return Operation(f"{name} {axis} {label}", call, formula, [SHAPE, *shapes], dtypes)

        f, plain = functools.partial(f, axis=axis), functools.partial(plain, axis=axis)
        yield operation(
            "mode_norms",
            lambda x, n, f=f, **options: f(x, mode_norms=n, **options),
            lambda x, n, plain=plain, axis=axis: plain(weighted(x, n, axis=axis)),
            (SHAPE[axis],),
        )
        for shape in (SHAPE, (6, 1, 2), (4, 1), SHAPE[2:], ()):
            yield operation(
                f"syntony {shape}",
                lambda x, s, f=f, **options: f(x, syntony=s, **options),
                lambda x, s, plain=plain: plain(weighted(x, syntony=s)),
                shape,
            )
            if shape:
                yield operation(
                    f"where {shape}",
                    lambda x, w, f=f, **options: f(x, where=w, **options),
                    lambda x, w, plain=plain: plain(x, where=w),
                    shape,
                    dtypes="fb",
                )
        yield operation(
            "scale",
            lambda x, n, s, f=f, **options: f(x, mode_norms=n, scale=s, **options),
            lambda x, n, s, plain=plain, axis=axis: plain(weighted(x, s * n, axis=axis)),
            (SHAPE[axis],),
            (),
        )
    for axis in range(2):
        yield Operation(
            f"cross_entropy {axis}",
            lambda x, labels, n, axis=axis, **options: syntonic_cross_entropy(
                x, labels, mode_norms=n, axis=axis, **options
            ),
            functools.partial(entropy, axis=axis),
            [ROWS, (ROWS[1 - axis],), (ROWS[axis],)],
            "fif",
        )


def exact():
    """Of integers a and b; results by leaves."""

    def ring(name, f, formula, operands=2, shapes=None):
        def call(*integers):
            return f(*(GoldenArray(a, b) for a, b in zip(integers[::2], integers[1::2])))

        shapes = [ROWS] * operands if shapes is None else shapes
        pairs = [s for s in shapes for _ in range(2)]
        return Operation(f"GoldenArray {name}", call, formula, pairs, "i" * len(pairs))

    def product(a, b, c, d, times=jnp.multiply):
        return times(a, c) + times(b, d), times(a, d) + times(b, c) + times(b, d)

    yield ring("+", lambda x, y: x + y, lambda a, b, c, d: (a + c, b + d))
    yield ring("-", lambda x, y: x - y, lambda a, b, c, d: (a - c, b - d))
    yield ring("*", lambda x, y: x * y, product)
    yield ring("<", lambda x, y: x < y, lambda a, b, c, d: a - c < b - d)
    yield ring("==", lambda x, y: x == y, lambda a, b, c, d: (a == c) & (b == d))
    matmul = functools.partial(product, times=jnp.matmul)
    yield ring("@", lambda x, y: x @ y, matmul, shapes=[ROWS, ROWS[::-1]])
    yield ring(
        "where",
        lambda x, y: lattice.where(x.a > 0, x, y),
        lambda a, b, c, d: (jnp.where(a > 0, a, c), jnp.where(a > 0, b, d)),
    )
    yield ring(
        "stack",
        lambda x, y: lattice.stack([x, y]),
        lambda a, b, c, d: (jnp.stack([a, c]), jnp.stack([b, d])),
    )
    yield ring("mul_phi", lambda x: x.mul_phi(), lambda a, b: (b, a + b), 1)
    yield ring("div_phi", lambda x: x.div_phi(), lambda a, b: (b - a, a), 1)
    yield ring("conjugate", lambda x: x.conjugate(), lambda a, b: (a + b, -b), 1)
    yield ring("neg", lambda x: -x, lambda a, b: (-a, -b), 1)
    yield ring("phi_power", lambda x: x.phi_power(3), lambda a, b: (a + b, b + a), 1)
    for name in ("norm", "trace", "sign", "to_float"):
        yield ring(name, lambda x, name=name: getattr(x, name)(), lambda a, b: a * b, 1)
    for axis in (None, 0, 1):
        yield ring(
            f"sum {axis}",
            lambda x, axis=axis: x.sum(axis),
            lambda a, b, axis=axis: (a.sum(axis), b.sum(axis)),
            1,
        )
    yield Operation(
        "GoldenArray.from_float",
        GoldenArray.from_float,
        lambda x: (jax.lax.stop_gradient(x),) * 2,
        [ROWS],
    )


OPERATIONS = [*elementwise(), *norms(), *softmaxes(), *exact()]
# Some of each kind; the others are slow tests.
SOME = [
    *elementwise(),
    *norms(),
    *battery.thinned(list(softmaxes()), 7),
    *battery.thinned(list(exact()), 7),
]
