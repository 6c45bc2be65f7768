"""How the kernels of a declared operation (_operation.py) are called.

The arrays of a call are called as the inputs and outputs are; in the backward pass the cotangent of
an output is `ct_<output>`, the gradient of an input `d_<input>`. The handlers find every array by
its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ._custom_call import Value
from ._numerics import accumulation_dtype

if TYPE_CHECKING:
    from ._derivative import Derivative
    from ._operation import Operation


def _no_numbers(**_: Any) -> dict[str, Any]:
    return {}


def _no_names(**_: Any) -> Sequence[str]:
    return ()


def _never(**_: Any) -> bool:
    return False


def _always(*_: Any, **__: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Kernels whose arrays are those of the operation. Its functions take what is static by name.

    Attributes:
      target: the name of the calls, without "syntonic_"; by default that of the operation.
      attributes: `attributes(**params)`, the numbers that the kernel takes.
      cotangent_attributes: likewise, of the backward pass.
      twins: `twins(**params)`, whether the first two inputs have the same gradient.
      passes: `passes(**params)`, names of inputs whose gradient equals the first cotangent.
      scratch: `scratch(first saved array)`, elements of scratch memory for each sum over rows.
      covers: `covers(results, **params)`, whether there is a kernel for results of these names.
      one_type: whether all rows must have one type.
    """

    target: str = ""
    attributes: Callable[..., dict[str, Any]] = _no_numbers
    cotangent_attributes: Callable[..., dict[str, Any]] = _no_numbers
    twins: Callable[..., bool] = _never
    passes: Callable[..., Sequence[str]] = _no_names
    scratch: Callable[[Any], int] | None = None
    covers: Callable[..., bool] = _always
    one_type: bool = False

    def forward(
        self, operation: Operation, inputs: Sequence[Any], wanted: Sequence[bool], **params: Any
    ) -> Sequence[Any] | None:
        """Those outputs that the mask `wanted` names; None where there is no kernel for them."""
        dtypes = _dtypes(inputs[0].dtype, params.get("dtype"))
        operands = [
            Value(i.name, i.kind, x) for i, x in zip(operation.inputs, inputs) if x is not None
        ]
        results = [
            Value(o.name, o.kind, dtype=dtypes[o.dtype], size=o.size)
            for o, w in zip(operation.outputs, wanted)
            if w
        ]
        return self._call(operation, "", operands, results, self.attributes, params)

    def cotangent(
        self,
        derivative: Derivative,
        saved: Sequence[Any],
        cotangents: Sequence[Any],
        wanted: Sequence[bool],
        **params: Any,
    ) -> Sequence[Any] | None:
        """The gradients of what the mask `wanted` names; None where there is no kernel for them.

        Without a cotangent of the first output a backward pass is elementwise. Cotangents of what
        is inner come with second derivatives.
        """
        present = [(o, ct) for o, ct in zip(derivative.outputs, cotangents) if ct is not None]
        if cotangents[0] is None or any(o.inner for o, _ in present):
            return None
        first, *rest = (x.name for x in derivative.inputs)
        twin = rest[0] if self.twins(**params) and all(wanted[:2]) else None
        asked = [x for x, w in zip(derivative.inputs, wanted) if w]
        gradients = dict.fromkeys(self.passes(**params), cotangents[0])
        computed = [x for x in asked if x.name not in gradients and x.name != twin]
        if computed:
            operands = [
                Value(x.name, x.kind, value, size=getattr(x, "size", 0))
                for x, value in zip(derivative.saved(**params), saved)
                if value is not None
            ]
            operands += [Value(f"ct_{o.name}", o.kind, ct) for o, ct in present]
            dtypes = _dtypes(params["data_dtype"], None)
            results = [
                Value(f"d_{x.name}", "partial", dtype=dtypes["accumulation"])
                if x.kind == "parameter"
                else Value(f"d_{x.name}", x.kind, dtype=dtypes["data"])
                for x in computed
            ]
            found = self._call(
                derivative, "_cotangent", operands, results, self.cotangent_attributes, params
            )
            if found is None:
                return None
            gradients |= {x.name: d for x, d in zip(computed, found)}
        if twin is not None:  # one buffer serves both
            gradients[twin] = gradients[first]
        return [gradients[x.name] for x in asked]

    def _call(
        self, operation, suffix, operands, results, attributes, params
    ) -> Sequence[Any] | None:
        if not self.covers([r.name for r in results], **params):
            return None
        if self.one_type and len(_row_types(operands, results, params)) > 1:
            return None
        if sums := [r for r in results if r.kind == "partial"]:
            assert self.scratch is not None
            size = self.scratch(operands[0].array) * len(sums)
            results = [*results, Value("scratch", "scratch", dtype=sums[0].dtype, size=size)]
        target = f"syntonic_{self.target or operation.name}{suffix}"
        return operation.geometry.call(target, operands, results, attributes(**params), **params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsByHand:
    """Kernels whose arrays are not those of the operation. None where there is no kernel.

    Attributes:
      forward_pass: `forward_pass(*inputs, devices=..., **params) -> all outputs, or None`.
      backward_pass: `backward_pass(saved, cotangents, wanted, devices=..., **params) -> the
        gradients of all inputs, or None`; the mask `wanted` says which are asked for.
    """

    forward_pass: Callable[..., Sequence[Any] | None] | None = None
    backward_pass: Callable[..., Sequence[Any] | None] | None = None

    def forward(self, operation, inputs, wanted, **params: Any) -> Sequence[Any] | None:
        """As that of `Kernels`."""
        del operation
        found = None if self.forward_pass is None else self.forward_pass(*inputs, **params)
        return None if found is None else [x for x, w in zip(found, wanted) if w]

    def cotangent(
        self, derivative, saved, cotangents, wanted, **params: Any
    ) -> Sequence[Any] | None:
        """As that of `Kernels`."""
        del derivative
        if self.backward_pass is None:
            return None
        found = self.backward_pass(saved, cotangents, wanted, **params)
        return None if found is None else [x for x, w in zip(found, wanted) if w]


def _row_types(operands: Sequence[Value], results: Sequence[Value], params: Any) -> set[Any]:
    """The floating types of rows, and of the gradients of data where there may be others too."""
    types = [v.array.dtype for v in operands if v.kind == "row"]
    types += [v.dtype for v in results if v.kind == "row"]
    types += [params["data_dtype"]] if "data_dtype" in params else []
    return {jnp.dtype(t) for t in types if jnp.issubdtype(t, jnp.floating)}


def _dtypes(data: Any, dtype: Any) -> dict[str, Any]:
    return {"data": data, "accumulation": accumulation_dtype(data), "dtype": dtype}
