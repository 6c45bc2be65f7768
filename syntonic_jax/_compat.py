"""Everything taken from jax that its public modules do not offer.

Each entry says why it is needed. Checked on jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
from jax import lax

# The rule by which jax runs one primitive outside jit. A cached `jax.jit` of `bind` in its place
# recurses without end under `jax_debug_nans`, which re-runs the primitive op by op.
from jax._src.dispatch import apply_primitive

__all__ = [
    "apply_primitive",
    "bare_context",
    "cuda_compute_capabilities",
    "lowering_platforms",
    "match_varying_axes",
    "partition_devices",
    "varying_axes",
]


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which `x` varies (empty outside `jax.shard_map`)."""
    aval = jax.typeof(x)
    # jax 0.10 moved the set of varying axes from `aval.vma` into `aval.manual_axis_type`.
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def match_varying_axes(*operands: Any) -> list[Any]:
    """Casts all operands to the union of their varying axes, as jax's own operators do."""
    axes = [varying_axes(x) for x in operands]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, axes)
    ]


def partition_devices(ctx: Any) -> int:
    """Over how many devices XLA may partition the computation that is being lowered.

    `ctx` is a lowering rule's context. The classes of its `axis_context` are private: a
    ShardingContext knows its `num_devices`; an SPMDAxisContext (inside shard_map) leaves to XLA
    only the mesh axes that are not manual.
    """
    axes = ctx.module_context.axis_context
    devices = getattr(axes, "num_devices", None)
    if devices is not None:
        return devices
    if (mesh := getattr(axes, "mesh", None)) is not None:
        return math.prod(n for name, n in mesh.shape.items() if name not in axes.manual_axes)
    return 1


def bare_context(ctx: Any) -> Any:
    """`ctx` with plain shapes and dtypes: no explicit shardings, no varying axes."""

    def bare(aval: Any) -> Any:
        return jax.core.ShapedArray(aval.shape, aval.dtype)

    return ctx.replace(
        avals_in=[bare(aval) for aval in ctx.avals_in],
        avals_out=[bare(aval) for aval in ctx.avals_out],
    )


def lowering_platforms(ctx: Any) -> tuple[str, ...]:
    """The platforms that a lowering rule's result is for."""
    return tuple(ctx.platforms or ctx.module_context.platforms)


def cuda_compute_capabilities() -> tuple[str, ...]:
    """Compute capabilities ("9.0") of the CUDA devices of this process; none without a GPU."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # jax knows no such platform here
        return ()
    return tuple(sorted({str(d.compute_capability) for d in devices}))  # type: ignore[attr-defined]
