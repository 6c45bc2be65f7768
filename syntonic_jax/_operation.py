"""One declaration of an operation, from which its three primitives follow.

What is declared: the inputs and outputs by name and kind, which of them the derivative needs, the
jnp forms, and how the kernels are called (_kernel_calls.py). What follows: the primitives with
their rules for jvp, transpose and vmap, the masks that say which arrays there are, which
cotangents can be other than zero, and the custom calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Primitive

from . import _dispatch
from ._derivative import (
    Derivative,
    FormOnCpu,
    Input,
    Output,
    chosen,
    chosen_of,
    kinds,
    spread,
    there,
)
from ._geometry import ROWS, Geometry
from ._kernel_calls import Kernels, KernelsByHand
from ._primitive import bind, define, forward_mode, is_zero, linear, zero_like

__all__ = ["Derivative", "Input", "Operation", "Output"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation and its derivatives.

    The jnp forms take what is static by name. Those of the derivative take `data_dtype` too, the
    type of the gradients of data. An operation that lies within a `custom_jvp` has none.

    Attributes:
      name: of the operation.
      function: the public function under whose name the default is looked up, if not `name`.
      inputs, outputs: in the order of the jnp forms. The first output is always there.
      saved: the names of the inputs and outputs that the derivative takes, in this order; or a
        function `saved(**params)` of what is static.
      moved: what the derivative is taken with respect to, if not the inputs themselves.
      move: `move(inputs, tangents, **params) -> tangents of moved`, in jnp. A tangent that is zero
        is None.
      reference: `reference(*inputs, **params) -> outputs`, in jnp.
      tangent, cotangent: in jnp (_derivative.py).
      linear_if: `linear_if(**params)`, raises unless the outputs are linear in the inputs. None:
        the operation has no transpose.
      forward_only: the names of parameters that the derivatives do not take.
      kernels: how they are called.
      default: what ``implementation=None`` takes where there are kernels, as measured.
      on_cpu, tangent_on_cpu, cotangent_on_cpu: make, of a jnp form, the form that a CPU runs
        faster, which takes `devices` too.
      divides_by_zero: `divides_by_zero(outputs, **params)`, where that is done, for checkify.
      indices: `indices(*inputs, **params)`, those that choose along an axis, likewise
        (_primitive.py).
      geometry: how the arrays lie.
    """

    name: str
    function: str = ""
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    saved: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    moved: tuple[Input, ...] = ()
    move: Callable[..., Sequence[Any]] | None = None
    reference: Callable[..., Sequence[Any]]
    tangent: Callable[..., Sequence[Any]] | None = None
    cotangent: Callable[..., Sequence[Any]] | None = None
    linear_if: Callable[..., None] | None = None
    forward_only: tuple[str, ...] = ()
    kernels: Kernels | KernelsByHand
    default: _dispatch.Implementation
    on_cpu: FormOnCpu | None = None
    tangent_on_cpu: FormOnCpu | None = None
    cotangent_on_cpu: FormOnCpu | None = None
    divides_by_zero: Callable[..., Any] | None = None
    indices: Callable[..., Any] | None = None
    geometry: Geometry = ROWS
    derivative: Derivative | None = dataclasses.field(init=False)
    primitive: Primitive = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        saved = () if callable(self.saved) else self.saved
        if unknown := set(saved).difference(self._named):
            raise ValueError(f"{self.name}: saves {sorted(unknown)}, of {list(self._named)}")
        object.__setattr__(self, "derivative", self._derivative())
        object.__setattr__(self, "primitive", self._define())
        _dispatch.prefer(self.function or self.name, self.default)

    @functools.cached_property
    def _named(self) -> dict[str, Input | Output]:
        return {x.name: x for x in (*self.inputs, *self.outputs)}

    def _saved(self, **params: Any) -> tuple[Input | Output, ...]:
        saved = self.saved(**params) if callable(self.saved) else self.saved
        return tuple(self._named[name] for name in saved)

    def __call__(self, *inputs: Any, outputs: Sequence[str] = (), **params: Any) -> list[Any]:
        """Binds the primitive. `outputs` names the results beside the first."""
        assert all(i.optional or x is not None for i, x in zip(self.inputs, inputs, strict=True))
        return bind(
            self.primitive,
            *(x for x in inputs if x is not None),
            given=there(inputs),
            outputs=tuple(i == 0 or o.name in outputs for i, o in enumerate(self.outputs)),
            **{"groups": 0} | params if self.geometry.grouped else params,
        )

    # ------------------------------------------------------------------------- primitives

    def _derivative(self) -> Derivative | None:
        if self.tangent is None or self.cotangent is None:
            return None
        return Derivative(
            name=self.name,
            operation=self.function or self.name,
            saved=self._saved,
            inputs=self.moved or self.inputs,
            outputs=tuple(o for o in self.outputs if not o.constant),
            tangent=self.tangent,
            cotangent=self.cotangent,
            kernels=self.kernels,
            geometry=self.geometry,
            tangent_on_cpu=self.tangent_on_cpu,
            cotangent_on_cpu=self.cotangent_on_cpu,
        )

    def _define(self) -> Primitive:
        """The primitive of the operation itself, and its rules."""

        def forward(*operands, given, outputs, **params):
            return chosen_of(self.reference, outputs)(*spread(operands, given), **params)

        def forward_on_cpu(*operands, given, outputs, **params):
            assert self.on_cpu is not None
            form = self.on_cpu(chosen_of(self.reference, outputs))
            return form(*spread(operands, given), **params)

        def kernel(*operands, devices, given, outputs, **params):
            found = None
            if operands[0].size:
                values = spread(operands, given)
                found = self.kernels.forward(self, values, outputs, devices=devices, **params)
            if found is None:
                return forward(*operands, given=given, outputs=outputs, **params)
            return found

        def divides_by_zero(*operands, given, outputs, **params):
            del outputs
            assert self.divides_by_zero is not None
            results = self.reference(*spread(operands, given), **params)
            return self.divides_by_zero(results, **params)

        def indices(*operands, given, outputs, **params):
            del outputs
            assert self.indices is not None
            return self.indices(*spread(operands, given), **params)

        def kinds_of(*, given, outputs, **_):
            return kinds(self.inputs, given), kinds(self.outputs, outputs)

        primitive = define(
            self.name,
            forward,
            operation=self.function or self.name,
            kernel=kernel,
            on_cpu=forward_on_cpu if self.on_cpu else None,
            divides_by_zero=divides_by_zero if self.divides_by_zero else None,
            indices=indices if self.indices else None,
        )
        if self.derivative is not None:
            forward_mode(primitive, self._jvp(primitive, self.derivative))
            if self.linear_if is not None:
                linear(primitive, self._transpose(self.linear_if, self.derivative))
        self.geometry.batch(primitive, kinds_of)
        return primitive

    def _jvp(self, primitive: Primitive, derivative: Derivative):
        def rule(primals, tangents, *, given, outputs, **params):
            inputs = spread(primals, given)
            moved = spread([None if is_zero(t) else t for t in tangents], given)
            if self.move is not None:
                shared = {k: v for k, v in params.items() if k != "implementation"}
                moved = self.move(inputs, moved, **shared)
            data_dtype = (inputs[0] if moved[0] is None else moved[0]).dtype
            of_derivative = self._of_derivative(params, data_dtype)
            saved = [x.name for x in self._saved(**of_derivative)]
            kept = tuple(o or x.name in saved for o, x in zip(outputs, self.outputs))
            results = spread(bind(primitive, *primals, given=given, outputs=kept, **params), kept)
            named = dict(zip(self._named, (*inputs, *results)))
            changes = iter(
                derivative.push(
                    [named[name] for name in saved],
                    moved,
                    [o for o, x in zip(outputs, self.outputs) if not x.constant],
                    **of_derivative,
                )
            )
            return list(chosen(results, outputs)), [
                zero_like(y) if x.constant else next(changes)
                for x, y, o in zip(self.outputs, results, outputs)
                if o
            ]

        return rule

    def _transpose(self, check: Callable[..., None], derivative: Derivative):
        def rule(cotangents, avals, wanted, *, outputs, **params):
            del params["given"]
            check(**params)
            of_derivative = self._of_derivative(params, avals[0].dtype)
            return derivative.pull([], spread(cotangents, outputs), wanted, **of_derivative)

        return rule

    def _of_derivative(self, params, data_dtype) -> dict[str, Any]:
        kept = {k: v for k, v in params.items() if k not in self.forward_only}
        return kept | {"data_dtype": data_dtype}
