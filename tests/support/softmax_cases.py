"""What the tests of the softmax operations share: cases for the battery, and the accuracy check."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_softmax
from battery import Operation
from jax.extend.core import ClosedJaxpr, Jaxpr

from syntonic_jax import syntonic_cross_entropy, syntonic_log_softmax, syntonic_softmax

FUNCTIONS = {
    f.__name__: f for f in (syntonic_softmax, syntonic_log_softmax, syntonic_cross_entropy)
}
# The operands that follow x, by how the classes get their weights; "shared" is one syntony for all
# rows, which takes another way through the library than one of its own for each.
MODES = {
    "identity": (),
    "learned": ("mode_norms", "scale"),
    "provided": ("syntony", "scale"),
    "shared": ("syntony",),
}
KINDS = {"mode_norms": "par", "scale": "scalar", "syntony": "weights"}


# --- the battery ----------------------------------------------------------------------------------


def formula(name, x, mode_norms=None, syntony=None, scale=1.0, where=None, labels=None):
    """In plain jnp, along the last axis; 0 where masked, in place of −inf too."""
    z = x
    if mode_norms is not None:
        z = z - scale * oracles.PHI_INV * mode_norms
    if syntony is not None:
        z = z + scale * jnp.log(jnp.where(syntony > 1e-10, syntony, 1e-10))
    if where is None:
        where = jnp.ones(x.shape, bool)
    z = z - jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True, initial=-1e9))
    terms = jnp.where(where, jnp.exp(z), 0)
    some = where.any(-1, keepdims=True)
    total = jnp.where(some, terms.sum(-1, keepdims=True), 1)
    if name == "syntonic_softmax":
        return terms / total
    log = jnp.where(where, z - jnp.log(total), 0)
    if labels is None:
        return log
    chosen = labels[..., None] == jnp.arange(x.shape[-1])
    return -jnp.where(chosen, log, 0).sum(-1, keepdims=True)


def discrete(x, name, masked):
    """A mask and labels for rows: functions of the data, so that vmap maps them too.

    A label is the first class that is not masked. Fully masked rows are among them.
    """
    where = jax.lax.stop_gradient(x) > 0  # jet knows no argmax of a series
    found: dict[str, Any] = {"where": where} if masked else {}
    if name == "syntonic_cross_entropy":
        found["labels"] = jnp.argmax(where, -1) if x.shape[-1] else jnp.zeros(x.shape[:-1], int)
    return found


def adjust(x, *rest):
    """x clear of 0, where mask and labels change, and weights clear of the floor.

    Weights for each class may lie below the floor, but not close to 0 above it: second derivatives
    are sums of terms in 1/w², which all but cancel.
    """

    def clear(r):
        if r.ndim == x.ndim:
            return jnp.abs(r) + 0.5
        return jnp.where(jnp.abs(r) < 0.1, 0.5, r) if r.ndim == 1 else r

    return [jnp.where(jnp.abs(x) < 0.01, 0.1, x), *map(clear, rest)]


def operation(name, mode="identity", masked=False, axis=-1, lead=(3,)) -> Operation:
    """With the softmax along `axis` of an array whose last axis was moved there."""
    names = MODES[mode]
    is_loss = name == "syntonic_cross_entropy"

    def call(x, *values, **options):
        position = min(axis, x.ndim - 1) % x.ndim
        given = {"x": x} | dict(zip(names, values, strict=True)) | discrete(x, name, masked)
        labels = {"labels": given.pop("labels")} if is_loss else {}
        for key, value in given.items():
            if key == "syntony" and mode == "shared":
                shape = [-1 if i == position else 1 for i in range(x.ndim)]
                given[key] = value.reshape(shape)
            elif key in ("x", "where", "syntony"):
                given[key] = jnp.moveaxis(value, -1, position)
        array, where = given.pop("x"), given.get("where")
        y = FUNCTIONS[name](array, **labels, axis=position, **given, **options)
        if is_loss:
            return y[..., None]  # so that it can be added to x
        if masked:  # −inf has no place in a loss
            y = jnp.where(where, y, 0)
        return jnp.moveaxis(y, position, -1)

    def reference(x, *values):
        given = dict(zip(names, values, strict=True))
        return formula(name, x, **given, **discrete(x, name, masked))

    kinds = ["rows"] + ["par" if mode == "shared" else KINDS[n] for n in names]
    target = "cross_entropy" if is_loss else "softmax"
    label = "-".join([mode] + ["masked"] * masked + [f"axis{axis}"] * (axis != -1))
    return Operation(
        f"{name.removeprefix('syntonic_')}-{label}",
        name,
        call,
        reference,
        tuple(kinds),
        name,
        takes_dtype=not is_loss,
        lead=lead,
        bad=(jnp.inf,),
        adjust=adjust,
        targets=(target, f"{target}_cotangent"),
    )


def equations(jaxpr):
    """All of them, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from equations(inner)


# --- accuracy -------------------------------------------------------------------------------------


def draw(rng, shape, axis, dtype, mode="identity", offset=0.0, spread=1.0):
    """x and the other operands by name, parameters in the accumulation type."""
    acc, width = oracles.accumulation(dtype), shape[axis]
    given = {"x": jnp.asarray(offset + spread * rng.normal(size=shape), dtype)}
    for name in MODES[mode]:
        if name == "mode_norms":
            given[name] = jnp.asarray(np.abs(rng.normal(size=width)) * 3, acc)
        elif name == "scale":
            given[name] = jnp.asarray(rng.uniform(0.5, 2), acc)
        else:
            along = [width if i == axis % len(shape) else 1 for i in range(len(shape))]
            size = along if mode == "shared" else shape
            given[name] = jnp.asarray(np.exp(rng.normal(size=size)), acc)
    return given


def check(implementation, name, given, ct, *, axis=-1, where=None, labels=None, dtype=None):
    """The result and all cotangents against the oracle."""
    x = given["x"]
    out = np.dtype(dtype or x.dtype)
    acc = oracles.accumulation(x.dtype)
    is_loss = name == "syntonic_cross_entropy"
    options: dict[str, Any] = {"axis": axis, "where": where, "implementation": implementation}
    options |= {"labels": labels} if is_loss else {"dtype": dtype}

    @jax.jit
    def both(given, ct):
        def call(given):
            rest = {k: v for k, v in given.items() if k != "x"}
            return FUNCTIONS[name](given["x"], **rest, **options)

        y, pull = jax.vjp(call, given)
        return y, pull(ct)[0]

    y, gradients = both(given, ct)
    for key, value in given.items():
        assert (gradients[key].dtype, gradients[key].shape) == (value.dtype, value.shape)

    rest = {k: v for k, v in given.items() if k != "x"}
    z = oracles_softmax.logits(x, **rest, axis=axis, where=where, acc=acc)
    results = oracles_softmax.normalised(z)
    if is_loss:
        assert y.dtype == acc
        # Rounded nowhere: nothing but the estimate's own slack, and the last operation's.
        oracles.assert_close(y, oracles_softmax.cross_entropy(z, labels), name, flush=True)
        dz = oracles_softmax.cross_entropy_vjp(z, labels, ct)
    else:
        assert (y.dtype, y.shape) == (out, x.shape)
        log = name == "syntonic_log_softmax"
        expected = results.log if log else results.softmax
        oracles.assert_close(np.moveaxis(np.asarray(y), axis, -1), expected, name, flush=True)
        ct = np.moveaxis(np.asarray(ct), axis, -1)
        vjp = oracles_softmax
        dz = vjp.log_softmax_vjp(z, ct) if log else vjp.softmax_vjp(z, ct, out)
    dx = np.moveaxis(np.asarray(gradients["x"]), axis, -1)
    oracles.assert_close(dx, dz, "cotangent of x", flush=True)

    expected = oracles_softmax.parameters_vjp(z, dz)
    for key in rest:
        estimate = getattr(expected, key)
        if key == "syntony":
            value, slack = (np.moveaxis(part, -1, axis) for part in estimate)
            over = tuple(i for i, n in enumerate(rest[key].shape) if n != value.shape[i])
            count = value.size // max(1, rest[key].size) if over else 0
            slack = slack + (count + oracles.STEPS) * oracles.unit(acc) * np.abs(value)
            estimate = oracles.Estimate(*(p.sum(over, keepdims=True) for p in (value, slack)))
        oracles.assert_close(gradients[key], estimate, f"cotangent of {key}", flush=True)
