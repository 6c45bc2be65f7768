"""Primitives closed under every transformation: the only place that touches jax's rule tables.

An operation is up to three primitives:

* ``stem`` computes those of its results that the mask ``outputs`` names, among them what the
  backward pass needs;
* ``stem_tangent(*saved, *tangents)`` is linear in the tangents, and its transpose is
* ``stem_cotangent(*saved, *cotangents)``, linear in the cotangents, its transpose being the
  tangent primitive again.

The last two share their static parameters. Two of these are masks: ``inputs`` says which inputs
of the operation have a tangent (or want a cotangent), ``outputs`` which of its outputs want a
tangent (or have a cotangent). Nothing symbolically zero is ever bound.

Every primitive carries the static parameter ``implementation`` (None, 'cuda' or 'xla'), by which
its lowering for a platform with kernels chooses between the kernel and the jnp reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from . import _compat, _dispatch

# reference(*operands, **params) -> arrays, in jnp; implementation is not among the params.
Reference = Callable[..., Sequence[Any]]
# kernel(*operands, devices=..., **params) -> arrays, in jnp around the custom call; devices is the
# number of devices over which the call may be partitioned.
Kernel = Callable[..., Sequence[Any]]


_EMPTY_MESH = jax.sharding.AbstractMesh((), ())
_with_kernel: dict[Primitive, Callable[[str], None]] = {}


def define(
    name: str,
    reference: Reference,
    *,
    operation: str,
    kernel: Kernel | None = None,
    on_cpu: Kernel | None = None,
    divides_by_zero: Callable[..., Any] | None = None,
    indices: Callable[..., _compat.Indices] | None = None,
):
    """A primitive of `operation` that computes `reference`, by `kernel` where that is chosen.

    `on_cpu` is the same function in jnp that a CPU runs faster. There may be operations in it that
    have no rule for explicit shardings and, where there is one device, branches.

    For `checkify` it says, in jnp and as functions of what the reference takes, where it divides by
    zero, and which integers among its operands choose along an axis; those out of use must be given
    as a valid index.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(_compat.apply_primitive, primitive))

    # Shapes, dtypes, explicit shardings and varying axes all follow from the one reference.
    @functools.lru_cache(maxsize=4096)
    def out_avals(avals, params, mesh):
        del mesh  # part of the key: shardings are resolved against it
        return jax.make_jaxpr(functools.partial(reference, **dict(params)))(*avals).out_avals

    @primitive.def_abstract_eval
    def _(*avals, implementation, **params):
        key = tuple(sorted(params.items()))
        return list(out_avals(avals, key, jax.sharding.get_abstract_mesh()))

    _compat.checkify_rule(primitive, operation, divides_by_zero, indices)
    taylor_mode(primitive, _series_of(primitive, reference))

    lower_reference = mlir.lower_fun(reference, multiple_results=True)

    def lower_jnp(platform):
        if platform == "cpu" and on_cpu is not None:
            return functools.partial(_lower_bare, on_cpu)
        return lower_reference

    for platform in (None,) if on_cpu is None else (None, "cpu"):
        lower = functools.partial(_lower_without_kernel, operation, kernel, lower_jnp(platform))
        mlir.register_lowering(primitive, lower, platform=platform)
    if kernel is not None:

        def register(platform):
            lower = functools.partial(
                _lower_chosen, operation, kernel, lower_jnp(platform), platform
            )
            mlir.register_lowering(primitive, lower, platform=platform)

        _with_kernel[primitive] = register
        register("cuda")
    return primitive


def _lower_without_kernel(operation, kernel, lower_jnp, ctx, *operands, implementation, **params):
    if implementation == "cuda" and kernel is not None:
        raise ValueError(
            f"{operation}: implementation='cuda' cannot run on "
            f"{' and '.join(_compat.lowering_platforms(ctx))}: {_dispatch.remedy()}"
        )
    return lower_jnp(ctx, *operands, **params)


def _lower_chosen(
    operation, kernel, lower_jnp, platform, ctx, *operands, implementation, **params
):  # fmt: skip
    if _dispatch.choose(operation, implementation, platform) == "xla":
        return lower_jnp(ctx, *operands, **params)
    return _lower_bare(kernel, ctx, *operands, **params)


def _lower_bare(function: Kernel, ctx, *operands, **params):
    """Lowers jnp that is traced on bare types under an empty mesh: no sharding constraints."""
    devices = _compat.partition_devices(ctx)
    with jax.sharding.use_abstract_mesh(_EMPTY_MESH):
        rule = mlir.lower_fun(functools.partial(function, devices=devices), multiple_results=True)
        return rule(_compat.bare_context(ctx), *operands, **params)


def lower_kernels_on(platform: str) -> None:
    """Lets implementation='cuda' emit the custom calls on one more platform.

    For tests, which serve the calls on platform "cpu" by a double written in C++.
    """
    for register in _with_kernel.values():
        register(platform)


def bind(primitive: Primitive, *operands: Any, **params: Any) -> list[Any]:
    """`primitive.bind` with all operands varying over the same manual mesh axes."""
    return primitive.bind(*_compat.match_varying_axes(*operands), **params)


def is_zero(tangent: Any) -> bool:
    """Whether a tangent or cotangent is symbolically zero."""
    return type(tangent) is ad.Zero


def zero_like(x: Any) -> ad.Zero:
    """The symbolic zero tangent of `x`."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def forward_mode(primitive: Primitive, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Sets the jvp rule: `rule(primals, tangents, **params) -> results, their tangents`."""
    ad.primitive_jvps[primitive] = rule


def taylor_mode(primitive: Primitive, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Sets the rule of `jet`: `rule(primals, series, **params) -> results, their series`.

    For a primitive whose derivatives are not those of its reference.
    """
    _compat.taylor_rule(primitive, rule)


def _series_of(primitive: Primitive, reference: Reference) -> Callable[..., tuple[Any, Any]]:
    """The primitive for the results, the jnp reference for the series."""

    def rule(primals, series, *, implementation, **params):
        results = bind(primitive, *primals, implementation=implementation, **params)
        moved = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.floating)]
        return results, _compat.taylor_series(
            _of_some(functools.partial(reference, **params), primals, moved),
            [primals[i] for i in moved],
            [series[i] for i in moved],
        )

    return rule


def _of_some(reference: Reference, operands: Sequence[Any], moved: Sequence[int]) -> Reference:
    """The reference as a function of the operands at the places `moved`, the others held."""

    def of_moved(*values):
        full = list(operands)
        for i, value in zip(moved, values):
            full[i] = value
        return tuple(reference(*_compat.match_varying_axes(*full)))

    return of_moved


def linear(primitive: Primitive, rule: Callable[..., Sequence[Any]]) -> None:
    """Sets the transpose of a primitive that is linear in all its operands.

    `rule(cotangents, avals, wanted, **params)` returns the cotangents of those operands, of the
    types `avals`, that the mask `wanted` names.
    """

    def transpose(cotangents, *operands, **params):
        if all(map(is_zero, cotangents)):
            return [None] * len(operands)
        avals = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in operands]
        wanted = tuple(map(ad.is_undefined_primal, operands))
        given = list(map(ad.instantiate_zeros, cotangents))
        results = iter(rule(given, avals, wanted, **params))
        return _only_undefined(operands, [next(results) if w else None for w in wanted])

    ad.primitive_transposes[primitive] = transpose


def batched(primitive: Primitive, rule: Callable[..., tuple[Sequence[Any], Sequence[Any]]]) -> None:
    """Sets the vmap rule: `rule(operands, axes, **params) -> results, axes`; None: not mapped."""
    batching.primitive_batchers[primitive] = rule


def transposes(
    tangent: Primitive, cotangent: Primitive, reference: Reference, transposed: Reference, reach
) -> None:
    """Makes the two linear primitives of an operation each other's transpose.

    `reference` and `transposed` are their jnp forms; `reach[i][j]` says whether input i of the
    operation affects its output j.
    """
    reached = tuple(zip(*reach))

    def push(residuals, tangents, *, inputs, outputs, **params):
        wanted = _prune(inputs, outputs, reach)
        if not any(wanted):
            return [None] * sum(outputs)
        results = bind(tangent, *residuals, *tangents, inputs=inputs, outputs=wanted, **params)
        return _spread(results, outputs, wanted)

    def pull(residuals, cotangents, *, inputs, outputs, **params):
        wanted = _prune(outputs, inputs, reached)
        if not any(wanted):
            return [None] * sum(inputs)
        results = bind(cotangent, *residuals, *cotangents, inputs=wanted, outputs=outputs, **params)
        return _spread(results, inputs, wanted)

    _linear_jvp(tangent, push, reference, "inputs")
    _linear_jvp(cotangent, pull, transposed, "outputs")
    _linear_transpose(tangent, pull, "inputs", "outputs")
    _linear_transpose(cotangent, push, "outputs", "inputs")


# In the helpers below "given" names the mask of a linear primitive's linear operands and "wanted"
# the mask of its results: inputs and outputs for a tangent primitive, the reverse for a cotangent.


def _linear_jvp(primitive: Primitive, apply, reference: Reference, given: str) -> None:
    """f(r, x), linear in x, has the tangent f(r, dx) + (d/dr f(r, x)) dr.

    The first term is the primitive again; the second, met only from the second order on, is the
    derivative of the jnp reference.
    """

    def rule(primals, tangents, **params):
        count = len(primals) - sum(params[given])
        residuals, dresiduals = primals[:count], tangents[:count]
        doperands = tangents[count:]
        results = bind(primitive, *primals, **params)

        dresults = [None] * len(results)
        moved = [not is_zero(d) for d in doperands]
        if any(moved):
            dparams = params | {given: _restrict(params[given], moved)}
            dresults = apply(residuals, [d for d in doperands if not is_zero(d)], **dparams)

        moved = [i for i, d in enumerate(dresiduals) if not is_zero(d)]
        if moved:
            params = {k: v for k, v in params.items() if k != "implementation"}
            _, through = jax.jvp(
                _of_some(functools.partial(reference, **params), primals, moved),
                tuple(residuals[i] for i in moved),
                tuple(dresiduals[i] for i in moved),
            )
            dresults = [t if d is None else d + t for d, t in zip(dresults, through)]
        return results, [zero_like(r) if d is None else d for r, d in zip(results, dresults)]

    ad.primitive_jvps[primitive] = rule


def _linear_transpose(primitive: Primitive, apply, given: str, wanted: str) -> None:
    def rule(cotangents, *operands, **params):
        # Called even when every cotangent is zero.
        present = [not is_zero(ct) for ct in cotangents]
        if not any(present):
            return [None] * len(operands)
        count = len(operands) - sum(params[given])
        residuals, linear_operands = operands[:count], operands[count:]
        # A linear operand may be an instantiated zero instead of an undefined primal.
        undefined = [ad.is_undefined_primal(x) for x in linear_operands]
        masks = {
            given: _restrict(params[given], undefined),
            wanted: _restrict(params[wanted], present),
        }
        results = iter(
            apply(residuals, [ct for ct in cotangents if not is_zero(ct)], **params | masks)
        )
        spread = [next(results) if u else None for u in undefined]
        return [None] * count + _only_undefined(linear_operands, spread)

    ad.primitive_transposes[primitive] = rule


def _only_undefined(operands: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """Each cotangent in its operand's explicit sharding; None for operands that want none."""
    return [
        _reshard(ct, x.aval) if ad.is_undefined_primal(x) and ct is not None else None
        for x, ct in zip(operands, cotangents)
    ]


def _reshard(cotangent: Any, aval: Any) -> Any:
    sharding = aval.sharding
    explicit = jax.sharding.AxisType.Explicit
    if (
        sharding.mesh.empty
        or explicit not in sharding.mesh.axis_types
        or jax.typeof(cotangent).sharding == sharding
    ):
        return cotangent
    return jax.sharding.reshard(cotangent, sharding)


def _restrict(mask: tuple[bool, ...], keep: Sequence[bool]) -> tuple[bool, ...]:
    """`mask` with its true entries replaced by `keep`, in order."""
    entries = iter(keep)
    return tuple(m and bool(next(entries)) for m in mask)


def _prune(given, wanted, reach) -> tuple[bool, ...]:
    """`wanted` without the entries that no given one reaches: those are structurally zero."""
    return tuple(w and any(g and r[j] for g, r in zip(given, reach)) for j, w in enumerate(wanted))


def _spread(results: Sequence[Any], asked: tuple[bool, ...], got: tuple[bool, ...]) -> list[Any]:
    """One entry for each true one in `asked`: the result, or None where it was not computed."""
    values = iter(results)
    return [next(values) if g else None for a, g in zip(asked, got) if a]
