"""What flax.serialization has to know of the exact types, without an import of Flax.

Flax looks types up in a table of its own. To import it takes a second, which nobody shall wait for
who does without it: a type is entered as soon as an array of it is made while Flax is there.
"""

from __future__ import annotations

import sys
from typing import Any

_unknown: list[Any] = []  # types that Flax does not know yet


def serializable(cls: Any) -> Any:
    """Decorates a pytree class with keys, whose leaves Flax is to save under their names."""
    _unknown.append(cls)
    return cls


def announce() -> None:
    """Enters the types into Flax's table if it has one by now."""
    if _unknown and (flax := sys.modules.get("flax.serialization")) is not None:
        while _unknown and hasattr(flax, "register_serialization_state"):
            _enter(flax, _unknown.pop())


def _enter(flax: Any, cls: Any) -> None:
    def to_state(x: Any) -> dict[str, Any]:
        children, _ = x.tree_flatten_with_keys()
        return {key.name: flax.to_state_dict(child) for key, child in children}

    def from_state(x: Any, state: Any) -> Any:
        children, aux = x.tree_flatten_with_keys()
        names = [key.name for key, _ in children]
        if not isinstance(state, dict) or set(state) != set(names):
            found = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"{cls.__name__}: the state must have the entries {names}, got {found}"
            )
        return cls.tree_unflatten(
            aux,
            [flax.from_state_dict(child, state[key.name], key.name) for key, child in children],
        )

    flax.register_serialization_state(cls, to_state, from_state, override=True)
