"""jit for the bodies of public functions: what jit itself refuses is explained by the argument.

A body checks its arguments where it is traced, so that an eager call that is right pays for none of
it. jit comes before: it hashes what is static and reads what is data, and speaks of its own affairs
where it cannot. Only then the arguments are looked at one by one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from . import _activation, _check, _dispatch

# What the arguments of all public functions are, by their names; others are floating-point arrays.
# Numbers, modes and axes are not here: public functions check them before (_check.py says why).
_STATIC: dict[str, Callable[[str, Any], Any]] = {
    "activation": _activation.check,
    "axis_name": _check.axis_name,
    "dtype": functools.partial(_check.result_dtype, default="float32"),
    "implementation": _dispatch.check_implementation,
}
_DATA: dict[str, Callable[[str, Any], Any]] = {
    "labels": _check.integers,
    "where": _check.booleans,
}


def jit(*static: str, function: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the body of the public function `function` with `jax.jit`.

    The parameters of a body have the names of the arguments that they are, and are passed by
    position; those named by `static` are static. One of them may be called 'function': the name
    of the public function, where a body serves several.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        names = tuple(inspect.signature(body).parameters)
        jitted = jax.jit(body, static_argnums=[names.index(name) for name in static], inline=True)

        @functools.wraps(body)
        def call(*values: Any) -> Any:
            try:
                return jitted(*values)
            except (TypeError, ValueError, OverflowError):
                given = dict(zip(names, values, strict=True))
                try:
                    _explain(given.pop("function", function), static, given)
                except (TypeError, ValueError) as error:
                    raise error from None  # not "during handling" of what jit said
                raise

        return call

    return decorate


def _explain(function: str, static: tuple[str, ...], given: dict[str, Any]) -> None:
    """Raises TypeError or ValueError if an argument is none that jit takes."""
    for name, value in given.items():
        if name in static:
            if name in _STATIC:
                _STATIC[name](function, value)
            _require_hash(function, name, value)
        elif value is not None:
            if name in _DATA:
                _DATA[name](function, value)
            else:
                _check.floating(function, **{name: value})
            _require_array(function, name, value)


def _require_hash(function: str, name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{function}: {name} must be hashable, as it is static under jit, "
            f"got {type(value).__name__}"
        ) from None


def _require_array(function: str, name: str, value: Any) -> None:
    try:
        for leaf in jax.tree.leaves(value):
            jax.typeof(leaf)
    except OverflowError:
        raise ValueError(f"{function}: {name} must fit a type of jax, got {value!r}") from None
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: {name} must be an array, got {type(value).__name__}"
        ) from None
