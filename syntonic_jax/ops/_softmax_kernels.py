"""How the softmax operations call their kernels: arrays as [*G, *R, width, inner], and attributes.

The kernels take data of one type, that of x: weights, results and cotangents of another are left to
the jnp reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .._custom_call import Value, row_call
from .._numerics import accumulation_dtype
from ._norm_arithmetic import scratch_size
from ._softmax import Form, Logits


def of_one_type(parts: Logits, *dtypes: Any) -> bool:
    """Whether the weights, and whatever else is to have them, have the type of x."""
    others = dtypes if parts.weights is None else (parts.weights.dtype, *dtypes)
    return all(dtype == parts.x.dtype for dtype in others)


def logit_values(parts: Logits) -> list[Value]:
    """The operands that a call begins with."""
    kinds = ("row", "parameter", "row", "scalar", "row")
    return [
        Value(name, kind, part)
        for name, kind, part in zip(parts._fields, kinds, parts)
        if part is not None
    ]


def call(
    target: str,
    operands: Sequence[Value],
    results: Sequence[Value],
    form: Form,
    *,
    groups: int,
    devices: int,
    **attributes: int,
) -> list[Any]:
    """A row-wise call whose rows lie along the axis of `form`."""
    row = operands[0].array
    trailing = row.shape[form.axis(row) + 1 :]

    def flat(value: Value) -> Value:
        if value.kind not in ("row", "vector") or not trailing:
            return value
        lead = value.array.shape[: value.array.ndim - len(trailing)]
        return value._replace(array=value.array.reshape(*lead, math.prod(trailing)))

    def whole(value: Value, x: Any) -> Any:
        if value.kind not in ("row", "vector") or not trailing:
            return x
        return x.reshape(*x.shape[:-1], *trailing)

    found = row_call(
        target,
        [flat(value) for value in operands],
        results,
        groups=groups,
        devices=devices,
        planes=bool(trailing),
        **attributes,
    )
    return [whole(value, x) for value, x in zip(results, found)]


def cotangents(row: Any, inputs: tuple[bool, bool], form: Form) -> list[Value] | None:
    """The results of a call for the cotangents of rows and bias; None where there is no kernel.

    Sums of classes are those of rows that are contiguous. Beside what the sums themselves take, the
    scratch memory holds one number a row.
    """
    if row.size == 0 or (inputs[1] and form.trailing):
        return None
    accumulation = accumulation_dtype(row.dtype)
    results = [Value("d_z", "row", dtype=row.dtype)] * inputs[0]
    if inputs[1]:
        rows = row.size // row.shape[-1] + 3
        results.append(Value("d_bias", "partial", dtype=accumulation))
        size = scratch_size(row) + rows
        results.append(Value("scratch", "scratch", dtype=accumulation, size=size))
    return results


def normalised_cotangent(
    target: str,
    reference: Any,
    names: Sequence[str],
    operands: Sequence[Any],
    devices: int,
    params: Any,
    **attributes: int,
) -> Sequence[Any]:
    """The cotangent of a primitive of `_softmax.normalised_jvp`, by its kernel where it has one.

    Behind the parts of the logits come numbers of rows, and a cotangent of the one or other shape,
    which are called `names`.
    """
    form, inputs = params["form"], params["inputs"]
    parts, others = form.split(operands)
    kinds = ["row" if other.ndim == parts.x.ndim else "vector" for other in others]
    rows = [other.dtype for other, kind in zip(others, kinds) if kind == "row"]
    results = cotangents(parts.x, inputs, form)
    # A cotangent of the normaliser comes only with second derivatives.
    if (
        results is None
        or params["outputs"] != (True, False)
        or not of_one_type(parts, params["row_dtype"], *rows)
    ):
        return reference(*operands, **params)
    return call(
        target,
        [*logit_values(parts), *map(Value, names, kinds, others)],
        results,
        form,
        groups=params["groups"],
        devices=devices,
        **attributes,
    )
