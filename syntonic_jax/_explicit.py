"""Meshes with explicit axes, on which the type of an array says over what it is sharded."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def explicit_spec(x: Any) -> tuple[Any, ...] | None:
    """Over which explicit mesh axes each axis of x is sharded; None on a mesh without any."""
    return spec_of(jax.typeof(x).sharding)


def spec_of(sharding: Any) -> tuple[Any, ...] | None:
    """The same of the sharding of a type."""
    return tuple(sharding.spec) if AxisType.Explicit in sharding.mesh.axis_types else None


def reshape(x: Any, shape: Any, spec: Any) -> Any:
    """x in another shape, sharded as `spec` says; None where no axis is explicit."""
    if spec is None:
        return x.reshape(shape)
    mesh = jax.typeof(x).sharding.mesh
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(mesh, jax.P(*spec)))


def gathered(x: Any) -> Any:
    """x, sharded over no explicit axis."""
    spec = explicit_spec(x)
    if spec is None or not any(spec):
        return x
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, jax.P(*(None for _ in spec))))


def along(x: Any, rows: Any, axis: int) -> Any:
    """x, which has the axes of rows but for one, sharded also over what they are sharded over."""
    spec, own = explicit_spec(rows), explicit_spec(x)
    if spec is None:
        return x
    wanted = (*spec[:axis], *spec[axis + 1 :])
    wanted = tuple(theirs or mine for theirs, mine in zip(wanted, own or wanted, strict=True))
    if wanted == own:
        return x
    mesh = jax.typeof(rows).sharding.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, jax.P(*wanted)))
