"""Loads the compiled kernels and registers them with XLA, or knows why there are none."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from pathlib import Path

# Before the extension: jaxlib must be the first to bring its own C++ symbols into the process.
import jax

_NO_KERNELS = "no_kernels.txt"  # the build leaves its reason here where it compiles no kernels


def _load():
    """The extension and None, or None and the reason."""
    name = f"{__package__}._kernels"
    try:
        kernels = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        note = Path(__file__).with_name(_NO_KERNELS)
        if note.is_file():
            return None, note.read_text(encoding="utf-8").strip()
        return None, (
            "it is a source tree, or was installed with SYNTONIC_CUDA=OFF or not on Linux"
        )
    except ImportError as error:
        return None, f"the extension does not load: {error}"
    refused = refusal(kernels.ffi_api_version(), runtime_ffi_api_version())
    return (None, refused) if refused else (kernels, None)


def runtime_ffi_api_version() -> tuple[int, int]:
    """The version of XLA's FFI in this jaxlib, from the header that it ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def refusal(built: tuple[int, int], runtime: tuple[int, int]) -> str | None:
    """Why handlers built for one version of the FFI must not be registered with another.

    XLA refuses newer ones while jax's CUDA plugin starts, and takes the plugin down with them.
    """
    if built <= runtime:
        return None
    jaxlib = metadata.version("jaxlib")
    return (
        f"the kernels were built for XLA FFI {built[0]}.{built[1]}, and jaxlib {jaxlib} has "
        f"{runtime[0]}.{runtime[1]}: rebuild against this jaxlib, or an older one"
    )


def _register(kernels) -> None:
    """Registers the custom call targets. Needs no GPU and initialises no backend."""
    for target, stages in kernels.registrations().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA")
        jax.ffi.register_ffi_target_as_batch_partitionable(target)


_kernels, _reason = _load()
if _kernels is not None:
    _register(_kernels)


def available() -> bool:
    """Whether this installation has kernels, be there a GPU or not."""
    return _kernels is not None


def reason() -> str | None:
    """Why this installation has no kernels; None where it has."""
    return _reason


def kernels() -> tuple[str, ...]:
    """The compiled kernels, by their stems; empty without any."""
    return () if _kernels is None else tuple(_kernels.kernels())


def architectures() -> tuple[str, ...]:
    """What the kernels were compiled for, as CMake names it ('90-real', '120-virtual', '90')."""
    return () if _kernels is None else tuple(_kernels.architectures())


def covers(compute_capability: str) -> bool:
    """Whether the kernels hold code that a device of this compute capability ('9.0') can run."""
    major, minor = map(int, compute_capability.split("."))
    return any(runs_on(architecture, (major, minor)) for architecture in architectures())


def runs_on(architecture: str, device: tuple[int, int]) -> bool:
    """Whether code for `architecture`, in CMake's notation, runs on a device (major, minor).

    Machine code ('-real') runs on its own major version from its minor version on, PTX
    ('-virtual') on everything as new, a plain number means both. The suffix 'a' ties code to one
    compute capability, 'f' to its family.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return False
    built = (int(match[1]), int(match[2]))
    same_family = built[0] == device[0] and built[1] <= device[1]
    if match[3] == "a":
        return built == device
    if match[3] == "f" or match[4] == "-real":
        return same_family
    return built <= device
