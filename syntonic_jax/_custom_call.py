"""Custom calls that XLA partitions by itself, and the rule by which row-wise calls are laid out.

XLA's batch partitioner needs two attributes on a call: ``num_batch_dims`` (GSPMD) and a sharding
rule (Shardy). Its contract: the first nb dimensions of every operand and result are batch
dimensions, which may be sharded; a value of rank below nb is replicated; and no result may be a
reduction over a batch dimension, which would be silently wrong. So

* parameters are kept at a rank below nb (batch dimensions are padded with ones), and
* sums over rows leave a call as one partial sum for each batch entry and are added up in jnp,
  where XLA puts the all-reduce.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

Shape = tuple[Any, ...]  # dimensions may be symbolic

_call_p = Primitive("custom_call")
_call_p.multiple_results = True


@_call_p.def_abstract_eval
def _(*_, results, **__):
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in results]


def _lower_call(ctx, *operands, target, batch_dims, rule, attributes, **_):
    extra = {}
    if batch_dims:
        extra["mhlo.frontend_attributes"] = mlir.ir_attribute({"num_batch_dims": str(batch_dims)})
        extra["sdy.sharding_rule"] = mlir.ir.Attribute.parse(rule)
    lower = jax.ffi.ffi_lowering(target, extra_attributes=extra)
    return lower(ctx, *operands, **dict(attributes))


mlir.register_lowering(_call_p, _lower_call)


def _call(target, operands, results, *, batch_dims=0, rule=None, attributes) -> list[Any]:
    """`operands` are {name: array}, `results` {name: (shape, dtype)}."""
    # The handlers read float64 and int32 attributes: numpy scalars fix the types.
    typed = {
        name: np.float64(value) if isinstance(value, float) else np.int32(value)
        for name, value in attributes.items()
    }
    # And they find every array by its name.
    typed |= {"operands": " ".join(operands), "results": " ".join(results)}
    return _call_p.bind(
        *operands.values(),
        target=target,
        results=tuple((tuple(shape), np.dtype(dtype)) for shape, dtype in results.values()),
        batch_dims=batch_dims,
        rule=rule,
        attributes=tuple(sorted(typed.items())),
    )


def elementwise_call(
    target: str, operands: Mapping[str, Any], dtypes: Mapping[str, Any], /, **attributes: Any
) -> list[Any]:
    """An elementwise call: every dimension is a batch dimension.

    All operands and results have the shape of the first operand; `dtypes` are those of the results.
    Both are by name.
    """
    shape = next(iter(operands.values())).shape
    static = all(isinstance(n, int) for n in shape)
    # The partitioner gathers a value that has batch dimensions only: one more, of one element.
    dims = [f"d{i}" for i in range(len(shape))] + ["one"]
    rule = _sharding_rule(
        [dims] * len(operands), [dims] * len(dtypes), dict(zip(dims, (*shape, 1))), ["one"]
    )
    results = _call(
        target,
        {name: x.reshape(*shape, 1) for name, x in operands.items()},
        {name: ((*shape, 1), dtype) for name, dtype in dtypes.items()},
        batch_dims=len(shape) if static else 0,
        rule=rule if static else None,
        attributes=attributes,
    )
    return [x.reshape(shape) for x in results]


class Value(NamedTuple):
    """An operand (`array` set) or a result (`dtype` set) of a row-wise call, by its name.

    The kinds, with G group dimensions and R row dimensions:
      row      [*G, *R, width]
      vector   [*G, *R]; with planes [*G, *R, elements]
      statistics [*G, *R, size], a few numbers for each row
      parameter [*G, width]
      scalar   [*G, 1]
      partial  a parameter-shaped sum over rows; leaves the call once for each batch entry
      totals   `size` numbers that are sums over rows, likewise: [*G, size]
      parts    like partial, but not added up: [*G, parts, width]
      scratch  rank 1, `size` elements, the last result; dropped from what `row_call` returns
    """

    name: str
    kind: str
    array: Any = None
    dtype: Any = None
    size: int = 0


def row_call(
    target: str,
    operands: Sequence[Value],
    results: Sequence[Value],
    *,
    groups: int,
    devices: int,
    planes: bool = False,
    **attributes: Any,
) -> list[Any]:
    """One call over rows, partitioned along its leading dimensions.

    The first operand is a row (or, for a call without a width, a vector) and fixes the shape. With
    `planes` a row is [width, elements]: a parameter has one entry for all elements of a plane.
    """
    first = operands[0]
    tail = first.array.shape[-1 - planes :] if first.kind == "row" else ()
    width = tail[:1]
    lead = first.array.shape[: len(first.array.shape) - len(tail)]
    sums = any(r.kind in ("partial", "totals", "parts") for r in results)
    batch, inner = _plan(lead, groups, sums, devices, first=planes)
    grouped = batch if groups else ()
    shapes = {
        "row": batch + inner + tail,
        "vector": batch + inner + tail[1:],
        "parameter": grouped + width,
        "scalar": (*grouped, 1),
        "partial": batch + width,
        "parts": batch + width,
    }
    static = all(isinstance(n, int) for n in lead + tail)

    def shape(value: Value) -> Shape:
        if value.kind == "scratch":
            return (value.size,)
        if value.kind == "totals":
            return (*batch, value.size)
        return batch + inner + (value.size,) if value.kind == "statistics" else shapes[value.kind]

    out = _call(
        target,
        {v.name: v.array.reshape(shape(v)) for v in operands},
        {v.name: (shape(v), v.dtype) for v in results},
        batch_dims=len(batch) if static else 0,
        rule=_row_rule(operands, results, batch, inner, tail, groups) if static else None,
        attributes=attributes,
    )

    def finish(value: Value, x: Any) -> Any:
        if value.kind in ("row", "vector"):
            return x.reshape(lead + (tail if value.kind == "row" else tail[1:]))
        if value.kind == "statistics":
            return x.reshape((*lead, value.size))
        if value.kind == "parts":
            return x.reshape((*lead[:groups], math.prod(batch[groups:]), *width))
        # The partial sums of a group are consecutive batch entries.
        return x.sum(tuple(range(groups, len(batch))))

    return [finish(v, x) for v, x in zip(results, out) if v.kind != "scratch"]


def _plan(
    lead: Shape, groups: int, sums: bool, devices: int, first: bool = False
) -> tuple[Shape, Shape]:
    """Batch and inner dimensions: ``batch + inner`` is a reshape of `lead`.

    A call that sums over rows returns one partial for each batch entry, so there should be few:
    one on a single device; on D devices the product of the earlier leading dimensions times
    gcd(n, D), n being the last one above 1. Every way of sharding that dimension over devices
    divides the gcd, so nothing is gathered. A call with symbolic dimensions is not partitioned.

    With `first` only the first leading dimension is divided, and what is sharded along another one
    is gathered: partial results for every row of an image would outweigh the image.
    """
    static = all(isinstance(n, int) for n in lead)
    if groups:
        batch, inner = lead[:groups], lead[groups:]
    elif sums and (devices == 1 or not static):
        batch, inner = (1,), (math.prod(lead),)
    elif sums and first and lead:
        parts = math.gcd(lead[0], devices)
        batch, inner = (parts,), (lead[0] // parts, *lead[1:])
    elif sums:
        last = max((i for i, n in enumerate(lead) if n > 1), default=0)
        n = lead[last] if lead else 1
        parts = math.gcd(n, devices)
        batch, inner = (*lead[:last], parts), (n // parts,)
    else:
        batch, inner = lead, ()
    # Replicated values must be of a lower rank than the batch: scratch always, parameters where
    # there are no groups. Both are of rank 1.
    return batch + (1,) * (1 if groups else max(0, 2 - len(batch))), inner


def _row_rule(operands, results, batch: Shape, inner: Shape, tail: Shape, groups: int) -> str:
    """The sharding rule of a row-wise call: batch dimensions may be sharded, nothing else."""
    dims = [f"d{i}" for i in range(len(batch + inner))]
    lead, columns = dims[: len(batch)], ["width", "plane"][: len(tail)]
    column = columns[:1]
    factors = {
        "row": dims + columns,
        "vector": dims + columns[1:],
        "statistics": [*dims, "numbers"],
        "parameter": (lead if groups else []) + column,
        "scalar": (lead if groups else []) + ["one"],
        "partial": lead + column,
        "totals": [*lead, "numbers"],
        "parts": lead + column,
        "scratch": ["scratch"],
    }
    sizes = dict(zip(dims + columns, batch + inner + tail))
    if any(v.kind == "scalar" for v in operands):
        sizes["one"] = 1
    for value in (*operands, *results):
        if value.kind in ("statistics", "totals"):
            sizes["numbers"] = value.size
    if results[-1].kind == "scratch":
        sizes["scratch"] = results[-1].size
    return _sharding_rule(
        [factors[v.kind] for v in operands],
        [factors[v.kind] for v in results],
        sizes,
        [f for f in sizes if f not in lead],
    )


@functools.cache
def _factor_name(index: int) -> str:
    """Shardy's names: i to z, then z_1, z_2, …"""
    return chr(ord("i") + index) if index < 18 else f"z_{index - 17}"


def _sharding_rule(operands, results, sizes: dict[str, int], replicated: Sequence[str]) -> str:
    """Shardy's text for a rule; values are lists of factors, one a dimension."""
    names = {factor: _factor_name(i) for i, factor in enumerate(sizes)}

    def mapping(values) -> str:
        return ", ".join("[" + ", ".join(names[f] for f in value) + "]" for value in values)

    text = f"({mapping(operands)})->({mapping(results)}) {{"
    text += ", ".join(f"{names[f]}={n}" for f, n in sizes.items()) + "}"
    if replicated:
        text += " need_replication={" + ", ".join(names[f] for f in replicated) + "}"
    return f"#sdy.op_sharding_rule<{text}, custom>"
