"""One declaration of an operation, from which its three primitives follow.

What is declared: the inputs and outputs by name and kind, which of them the derivative needs, the
jnp forms, and the numbers that the kernel takes. What follows: the primitives with their rules for
jvp, transpose and vmap, the masks that say which arrays there are, which cotangents can be other
than zero, and the custom calls, whose handlers find every array by its name.

The arrays of a call are called as the inputs and outputs are; in the backward pass the cotangent of
an output is `ct_<output>`, the gradient of an input `d_<input>`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Primitive

from . import _batching, _dispatch
from ._custom_call import Value, elementwise_call, row_call
from ._numerics import accumulation_dtype
from ._primitive import bind, define, forward_mode, is_zero, transposes


@dataclasses.dataclass(frozen=True)
class Input:
    """`kind` as in _custom_call.py. `reaches` names the outputs that it has an effect on.

    An input that a call does not have is None.
    """

    name: str
    kind: str = "row"
    reaches: tuple[str, ...] | None = None  # None: all


@dataclasses.dataclass(frozen=True)
class Output:
    """`dtype`: 'data', the type of the first input; 'accumulation'; or 'dtype', the parameter.

    What is `inner` is there for the derivative alone: it has cotangents only in second derivatives,
    for which there is no kernel.
    """

    name: str
    kind: str = "row"
    dtype: str = "data"
    size: int = 0
    inner: bool = False


def _nothing(**_: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation and its derivatives.

    Attributes:
      name: of the operation, and of its calls.
      inputs, outputs: in the order of the jnp forms. The first of each are always there.
      saved: the names of the inputs and outputs that the derivative takes, in this order.
      reference: `reference(*inputs, **params) -> outputs`, in jnp. Inputs that are not there are
        None.
      tangent: `tangent(saved, tangents, **params) -> tangents of the outputs`; None where there is
        none.
      cotangent: `cotangent(saved, cotangents, **params) -> cotangents of the inputs`, likewise.
      default: what ``implementation=None`` takes where there are kernels, as measured.
      attributes: `attributes(**params)`, the numbers that the kernel takes.
      cotangent_attributes: likewise, of the backward pass.
      forward_only: the names of parameters that the derivatives do not take.
      twins: `twins(**params)`, whether the gradients of the first two inputs are one.
      scratch: elements of memory beside each sum over rows of the first of what is saved.
      on_cpu, cotangent_on_cpu: make, of the reference or the cotangent, the form that a CPU runs
        faster, which takes `devices` too.
      divides_by_zero: of the outputs, where there is a division by zero, for checkify.
      elementwise: whether all arrays have one shape; otherwise they are rows in groups, and the
        forms take the number of groups as a parameter.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    saved: tuple[str, ...]
    reference: Callable[..., Sequence[Any]]
    tangent: Callable[..., Sequence[Any]]
    cotangent: Callable[..., Sequence[Any]]
    default: _dispatch.Implementation
    attributes: Callable[..., dict[str, Any]] = _nothing
    cotangent_attributes: Callable[..., dict[str, Any]] = _nothing
    forward_only: tuple[str, ...] = ()
    twins: Callable[..., bool] | None = None
    scratch: Callable[[Any], int] | None = None
    on_cpu: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    cotangent_on_cpu: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    divides_by_zero: Callable[..., Any] | None = None
    elementwise: bool = False
    primitives: tuple[Primitive, ...] = dataclasses.field(init=False)  # itself, its derivatives

    def __post_init__(self) -> None:
        if unknown := set(self.saved).difference(self._kinds):
            raise ValueError(f"{self.name}: saves {sorted(unknown)}, of {list(self._kinds)}")
        object.__setattr__(self, "primitives", self._define())
        _dispatch.prefer(self.name, self.default)

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        return {x.name: x.kind for x in (*self.inputs, *self.outputs)}

    def __call__(self, *inputs: Any, outputs: Sequence[str] = (), **params: Any) -> list[Any]:
        """Binds the primitive to inputs, None for those that are not there.

        `outputs` names the results beside the first.
        """
        return bind(
            self.primitives[0],
            *(x for x in inputs if x is not None),
            given=tuple(x is not None for x in inputs),
            outputs=tuple(i == 0 or o.name in outputs for i, o in enumerate(self.outputs)),
            **params if self.elementwise else {"groups": 0} | params,
        )

    # ------------------------------------------------------------------------- primitives

    def _define(self) -> tuple[Primitive, ...]:
        """The primitives and their rules."""

        def some_of(form, mask):
            return lambda *values, **params: _chosen(form(*values, **params), mask)

        def forward(*operands, given, outputs, **params):
            return _chosen(self.reference(*_spread(operands, given), **params), outputs)

        def forward_on_cpu(*operands, given, outputs, **params):
            assert self.on_cpu is not None
            form = self.on_cpu(some_of(self.reference, outputs))
            return form(*_spread(operands, given), **params)

        def divides_by_zero(*operands, given, outputs, **params):
            del outputs
            assert self.divides_by_zero is not None
            return self.divides_by_zero(self.reference(*_spread(operands, given), **params))

        def tangent(*operands, given, inputs, outputs, **params):
            saved, tangents = self._split(operands, given)
            return _chosen(self.tangent(saved, _spread(tangents, inputs), **params), outputs)

        def cotangent(*operands, given, inputs, outputs, **params):
            saved, cotangents = self._split(operands, given)
            return _chosen(self.cotangent(saved, _spread(cotangents, outputs), **params), inputs)

        def cotangent_on_cpu(*operands, given, inputs, outputs, **params):
            assert self.cotangent_on_cpu is not None
            saved, cotangents = self._split(operands, given)
            form = self.cotangent_on_cpu(some_of(self.cotangent, inputs))
            return form(saved, _spread(cotangents, outputs), **params)

        def kernel(*operands, devices, **params):
            if operands[0].size == 0:
                return forward(*operands, **params)
            return self._forward_call(operands, devices, **params)

        def cotangent_kernel(*operands, devices, **params):
            if operands[0].size == 0 or not self._has_kernel(params["outputs"]):
                return cotangent(*operands, **params)
            return self._cotangent_call(operands, devices, **params)

        primitive = define(
            self.name,
            forward,
            operation=self.name,
            kernel=kernel,
            on_cpu=forward_on_cpu if self.on_cpu else None,
            divides_by_zero=divides_by_zero if self.divides_by_zero else None,
        )
        tangent_primitive = define(f"{self.name}_tangent", tangent, operation=self.name)
        cotangent_primitive = define(
            f"{self.name}_cotangent",
            cotangent,
            operation=self.name,
            kernel=cotangent_kernel,
            on_cpu=cotangent_on_cpu if self.cotangent_on_cpu else None,
        )
        primitives = (primitive, tangent_primitive, cotangent_primitive)
        forward_mode(primitive, self._jvp(primitive, tangent_primitive))
        reach = tuple(
            tuple(i.reaches is None or o.name in i.reaches for o in self.outputs)
            for i in self.inputs
        )
        transposes(tangent_primitive, cotangent_primitive, tangent, cotangent, reach)
        if self.elementwise:
            for each in primitives:
                _batching.batch_elementwise(each)
        else:
            _batching.batch_rows(primitive, self._forward_kinds)
            _batching.batch_rows(tangent_primitive, self._tangent_kinds)
            _batching.batch_rows(cotangent_primitive, self._cotangent_kinds)
        return primitives

    def _jvp(self, primitive, tangent_primitive):
        def rule(primals, tangents, *, given, outputs, **params):
            kept = tuple(o or x.name in self.saved for o, x in zip(outputs, self.outputs))
            results = bind(primitive, *primals, given=given, outputs=kept, **params)
            results = _spread(results, kept)
            named = dict(zip((x.name for x in self.inputs), _spread(primals, given)))
            named |= dict(zip((x.name for x in self.outputs), results))
            there = iter([not is_zero(t) for t in tangents])
            d_results = bind(
                tangent_primitive,
                *(named[name] for name in self.saved if named[name] is not None),
                *(t for t in tangents if not is_zero(t)),
                given=tuple(g and x.name in self.saved for g, x in zip(given, self.inputs)),
                inputs=tuple(g and next(there) for g in given),
                outputs=outputs,
                **{k: v for k, v in params.items() if k not in self.forward_only},
            )
            return list(_chosen(results, outputs)), d_results

        return rule

    def _split(self, operands, given) -> tuple[list[Any], Sequence[Any]]:
        """What was saved, None for inputs that were not there, and the linear operands."""
        there = self._saved_there(given)
        return _spread(operands[: sum(there)], there), operands[sum(there) :]

    def _saved_there(self, given) -> tuple[bool, ...]:
        inputs = dict(zip((x.name for x in self.inputs), given))
        return tuple(inputs.get(name, True) for name in self.saved)

    # ------------------------------------------------------------------------------ kernels

    def _forward_call(self, operands, devices, *, given, outputs, **params) -> list[Any]:
        values = _spread(operands, given)
        dtypes = _dtypes(values[0], params.get("dtype"))
        results = [
            Value(o.name, o.kind, dtype=dtypes[o.dtype], size=o.size)
            for o in _chosen(self.outputs, outputs)
        ]
        named = [Value(i.name, i.kind, x) for i, x in zip(self.inputs, values) if x is not None]
        return self._call(self.name, named, results, devices, params, self.attributes)

    def _has_kernel(self, outputs: Sequence[bool]) -> bool:
        """Without a cotangent of the first output a backward pass is elementwise."""
        inner = any(o.inner for o in _chosen(self.outputs, outputs))
        return bool(outputs[0]) and not inner

    def _cotangent_call(self, operands, devices, *, given, inputs, outputs, **params) -> list[Any]:
        saved, cotangents = self._split(operands, given)
        twins = bool(inputs[0] and self.twins and inputs[1] and self.twins(**params))
        wanted = (inputs[0], False, *inputs[2:]) if twins else inputs  # one buffer serves both
        first, sizes = saved[0], {o.name: o.size for o in self.outputs}
        dtypes = _dtypes(first, None)
        results = []
        for i in _chosen(self.inputs, wanted):
            summed = i.kind == "parameter"
            dtype = dtypes["accumulation" if summed else "data"]
            results.append(Value(f"d_{i.name}", "partial" if summed else i.kind, dtype=dtype))
        if sums := sum(r.kind == "partial" for r in results):
            assert self.scratch is not None
            size = self.scratch(first) * sums
            results.append(Value("scratch", "scratch", dtype=dtypes["accumulation"], size=size))
        named = [
            Value(name, self._kinds[name], x, size=sizes.get(name, 0))
            for name, x in zip(self.saved, saved)
            if x is not None
        ]
        named += [
            Value(f"ct_{o.name}", o.kind, ct)
            for o, ct in zip(_chosen(self.outputs, outputs), cotangents)
        ]
        target, attributes = f"{self.name}_cotangent", self.cotangent_attributes
        out = self._call(target, named, results, devices, params, attributes)
        return [out[0], *out] if twins else out

    def _call(self, target, operands, results, devices, params, attributes) -> list[Any]:
        target, numbers = f"syntonic_{target}", attributes(**params)
        if self.elementwise:
            arrays = {v.name: v.array for v in operands}
            return elementwise_call(target, arrays, {v.name: v.dtype for v in results}, **numbers)
        groups = params["groups"]
        return row_call(target, operands, results, groups=groups, devices=devices, **numbers)

    # --------------------------------------------------------------------------------- vmap

    def _forward_kinds(self, *, given, outputs, **_):
        return _kinds(_chosen(self.inputs, given)), _kinds(_chosen(self.outputs, outputs))

    def _saved_kinds(self, given) -> list[str]:
        there = _chosen(self.saved, self._saved_there(given))
        return [_batching_kind(self._kinds[name]) for name in there]

    def _tangent_kinds(self, *, given, inputs, outputs, **_):
        tangents = _kinds(_chosen(self.inputs, inputs))
        return self._saved_kinds(given) + tangents, _kinds(_chosen(self.outputs, outputs))

    def _cotangent_kinds(self, *, given, inputs, outputs, **_):
        cotangents = _kinds(_chosen(self.outputs, outputs))
        return self._saved_kinds(given) + cotangents, _kinds(_chosen(self.inputs, inputs))


def _batching_kind(kind: str) -> str:
    return "row" if kind == "statistics" else kind


def _kinds(values: Sequence[Input | Output]) -> list[str]:
    return [_batching_kind(v.kind) for v in values]


def _dtypes(data: Any, dtype: Any) -> dict[str, Any]:
    return {"data": data.dtype, "accumulation": accumulation_dtype(data.dtype), "dtype": dtype}


def _spread(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """The values at the places that the mask names, None at the others."""
    given = iter(values)
    return [next(given) if m else None for m in mask]


def _chosen(values: Sequence[Any], mask: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(v for v, m in zip(values, mask, strict=True) if m)
