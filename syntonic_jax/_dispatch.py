"""Which implementation an operation takes: the one place where it is decided.

``implementation='cuda'`` is the kernel, ``'xla'`` the jnp composition. None takes the kernel only
where the extension is loaded and holds code for the architecture of every CUDA device of the
process, and there what measurement shows to be faster (docs/implementation.md has the figures).
"""

from __future__ import annotations

from typing import Any, Literal

from . import _compat, _extension

Implementation = Literal["cuda", "xla"]

# A row reduction leaves XLA's fusions anyway, and the kernel reads the row once. An elementwise
# operation belongs to the fusion of whatever stands around it. What no kernel was measured for is
# jnp. All public functions are here, for the report; some are calls of another, which decides. What
# is declared (_operation.py) says it there, and is added when it is imported.
_PREFERRED: dict[str, Implementation] = {
    "phi_residual_relu": "xla",
    "phi_residual_gelu": "xla",
    "output_statistics": "cuda",
    "crystallize": "cuda",
}
OPERATIONS = _PREFERRED.keys()


def prefer(operation: str, implementation: Implementation) -> None:
    """Adds what ``implementation=None`` takes for an operation where there are kernels."""
    _PREFERRED[operation] = implementation


def check_implementation(function: str, implementation: Any) -> None:
    """Raises ValueError unless `implementation` is None, 'cuda' or 'xla'."""
    named = isinstance(implementation, str) and implementation in ("cuda", "xla")
    if implementation is not None and not named:
        raise ValueError(
            f"{function}: implementation must be None, 'cuda' or 'xla', got {implementation!r}"
        )


def selected(
    operation: str, platform: str, compute_capability: str | None = None
) -> Implementation:
    """What ``implementation=None`` takes for `operation` on a device of this kind."""
    if platform not in ("cuda", "gpu") or compute_capability is None:
        return "xla"
    runs = _extension.available() and _extension.covers(compute_capability)
    return _PREFERRED[operation] if runs else "xla"


def choose(operation: str, implementation: Any, platform: str) -> Implementation:
    """What a lowering for `platform`, one of those that can have kernels, takes.

    Lowering for cuda where there is no CUDA device (a dry run, an export) takes the kernel only
    where it was asked for by name: nothing is known of the machine that will run it.

    Raises:
      RuntimeError: the kernel was asked for by name and this process could not run it.
    """
    if implementation == "xla":
        return "xla"
    capabilities = _compat.cuda_compute_capabilities() if platform == "cuda" else ()
    if implementation is None:
        choices = {selected(operation, platform, c) for c in capabilities}
        return "cuda" if choices == {"cuda"} else "xla"
    if capabilities and not _extension.available():
        raise RuntimeError(
            f"{operation}: implementation='cuda' has no kernels: {_remedy_kernels()}"
        )
    for capability in capabilities:
        if not _extension.covers(capability):
            raise RuntimeError(
                f"{operation}: implementation='cuda' has no kernel for compute capability "
                f"{capability}, only for {', '.join(_extension.architectures())}; rebuild with "
                f"SYNTONIC_CUDA_ARCHITECTURES=native, or leave implementation=None"
            )
    return "cuda"


def remedy() -> str:
    """Why implementation='cuda' cannot run on a platform other than cuda, and what to do."""
    why = [] if _extension.available() else [_remedy_kernels()]
    if not _compat.cuda_compute_capabilities():
        why.append(
            "jax sees no CUDA device (is there a GPU, and is jax's CUDA plugin installed: "
            "pip install 'syntonic-jax[cuda13]'?)"
        )
    why.append("leave implementation=None to run the jnp composition here")
    return "; ".join(why)


def _remedy_kernels() -> str:
    return f"this installation has no kernels ({_extension.reason()}; see docs/building.md)"
