"""A derivative: a linear function and its transpose, declared as one, two primitives.

The function takes what was saved and, linear in them, the tangents of some inputs; its transpose
takes what was saved and the cotangents of the outputs. Any of them may be missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Primitive

from ._geometry import Geometry
from ._kernel_calls import Kernels, KernelsByHand
from ._primitive import bind, define, transposes

FormOnCpu = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Input:
    """`kind` as in _custom_call.py. `reaches` names the outputs that it has an effect on.

    What is `optional` is None in a call that does not have it.
    """

    name: str
    kind: str = "row"
    reaches: tuple[str, ...] | None = None  # None: all
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Output:
    """`dtype`: 'data', the type of the first input; 'accumulation'; or 'dtype', the parameter.

    What is `inner` is there for the derivative alone: it has cotangents only in second derivatives,
    for which there is no kernel. What is `constant` has no derivative.
    """

    name: str
    kind: str = "row"
    dtype: str = "data"
    size: int = 0
    inner: bool = False
    constant: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derivative:
    """A linear function and its transpose. Its forms take what is static by name.

    Attributes:
      name: of what this is the derivative of.
      operation: whose `implementation=None` decides for it.
      saved: `saved(**params)`, what both take.
      inputs, outputs: whose tangents and cotangents they take.
      tangent: `tangent(saved, tangents, **params) -> tangents of the outputs`, in jnp; None where
        there is none.
      cotangent: `cotangent(saved, cotangents, **params) -> cotangents of the inputs`, likewise.
      kernels: how that of the transpose is called; there is none for tangents.
      tangent_on_cpu, cotangent_on_cpu: make, of a jnp form, the form that a CPU runs faster, which
        takes `devices` too.
      geometry: how the arrays lie.
    """

    name: str
    operation: str
    saved: Callable[..., tuple[Input | Output, ...]]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    tangent: Callable[..., Sequence[Any]]
    cotangent: Callable[..., Sequence[Any]]
    kernels: Kernels | KernelsByHand
    geometry: Geometry
    tangent_on_cpu: FormOnCpu | None = None
    cotangent_on_cpu: FormOnCpu | None = None
    primitives: tuple[Primitive, Primitive] = dataclasses.field(init=False)  # tangent, cotangent

    def __post_init__(self) -> None:
        object.__setattr__(self, "primitives", self._define())

    def push(
        self, saved: Sequence[Any], tangents: Sequence[Any], outputs: Sequence[bool], **params: Any
    ) -> list[Any]:
        """The tangents of those outputs that the mask names; None is what is not there."""
        return bind(
            self.primitives[0],
            *(x for x in (*saved, *tangents) if x is not None),
            given=there(saved),
            inputs=there(tangents),
            outputs=tuple(outputs),
            **params,
        )

    def pull(
        self, saved: Sequence[Any], cotangents: Sequence[Any], inputs: Sequence[bool], **params: Any
    ) -> list[Any]:
        """The cotangents of those inputs that the mask names, likewise."""
        return bind(
            self.primitives[1],
            *(x for x in (*saved, *cotangents) if x is not None),
            given=there(saved),
            inputs=tuple(inputs),
            outputs=there(cotangents),
            **params,
        )

    def _define(self) -> tuple[Primitive, Primitive]:
        def tangent(*operands, given, inputs, outputs, **params):
            form = chosen_of(self.tangent, outputs)
            return form(*_split(operands, given, inputs), **params)

        def cotangent(*operands, given, inputs, outputs, **params):
            form = chosen_of(self.cotangent, inputs)
            return form(*_split(operands, given, outputs), **params)

        def tangent_on_cpu(*operands, given, inputs, outputs, **params):
            assert self.tangent_on_cpu is not None
            form = self.tangent_on_cpu(chosen_of(self.tangent, outputs))
            return form(*_split(operands, given, inputs), **params)

        def cotangent_on_cpu(*operands, given, inputs, outputs, **params):
            assert self.cotangent_on_cpu is not None
            form = self.cotangent_on_cpu(chosen_of(self.cotangent, inputs))
            return form(*_split(operands, given, outputs), **params)

        def kernel(*operands, devices, given, inputs, outputs, **params):
            found = None
            if operands[0].size:
                saved, cotangents = _split(operands, given, outputs)
                found = self.kernels.cotangent(
                    self, saved, cotangents, inputs, devices=devices, **params
                )
            if found is None:
                masks = {"given": given, "inputs": inputs, "outputs": outputs}
                return cotangent(*operands, **masks, **params)
            return found

        primitives = (
            define(
                f"{self.name}_tangent",
                tangent,
                operation=self.operation,
                on_cpu=tangent_on_cpu if self.tangent_on_cpu else None,
            ),
            define(
                f"{self.name}_cotangent",
                cotangent,
                operation=self.operation,
                kernel=kernel,
                on_cpu=cotangent_on_cpu if self.cotangent_on_cpu else None,
            ),
        )
        reach = tuple(
            tuple(i.reaches is None or o.name in i.reaches for o in self.outputs)
            for i in self.inputs
        )
        transposes(*primitives, tangent, cotangent, reach)
        self.geometry.batch(primitives[0], self._tangent_kinds)
        self.geometry.batch(primitives[1], self._cotangent_kinds)
        return primitives

    def _saved_kinds(self, given, params) -> list[str]:
        return kinds(self.saved(**params), given)

    def _tangent_kinds(self, *, given, inputs, outputs, **params):
        operands = self._saved_kinds(given, params) + kinds(self.inputs, inputs)
        return operands, kinds(self.outputs, outputs)

    def _cotangent_kinds(self, *, given, inputs, outputs, **params):
        operands = self._saved_kinds(given, params) + kinds(self.outputs, outputs)
        return operands, kinds(self.inputs, inputs)


def _split(operands, given, mask) -> tuple[list[Any], list[Any]]:
    """What was saved and what the form is linear in, None where it is not there."""
    count = sum(given)
    return spread(operands[:count], given), spread(operands[count:], mask)


# What vmap takes the kinds of _custom_call.py for.
_BATCHED_AS = {"statistics": "row", "scalar": "parameter"}


def kinds(values: Sequence[Input | Output], mask: Sequence[bool]) -> list[str]:
    """The kinds (_batching.py) of those values that the mask names."""
    return [_BATCHED_AS.get(v.kind) or v.kind for v in chosen(values, mask)]


def there(values: Sequence[Any]) -> tuple[bool, ...]:
    """The mask of what is not None."""
    return tuple(x is not None for x in values)


def spread(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """The values at the places that the mask names, None at the others."""
    given = iter(values)
    return [next(given) if m else None for m in mask]


def chosen(values: Sequence[Any], mask: Sequence[bool]) -> tuple[Any, ...]:
    """The values that the mask names."""
    return tuple(v for v, m in zip(values, mask, strict=True) if m)


def chosen_of(form: Callable[..., Sequence[Any]], mask: Sequence[bool]) -> Callable[..., Any]:
    """A form, of whose results there are those that the mask names."""
    return lambda *values, **params: chosen(form(*values, **params), mask)
