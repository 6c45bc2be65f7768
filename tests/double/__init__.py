"""A CPU double of the CUDA extension.

The same handlers (src/ffi) over plain C++ launchers, registered for platform cpu: tests run the
real custom calls, their attributes, partial sums and sharding, on a machine without a GPU.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from filelock import FileLock

PLAIN = "golden_layer_norm", "phi_residual_rmsnorm"  # launchers that are plain C++ already
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HANDLERS = sorted(p for p in (ROOT / "src" / "ffi").glob("*.cc") if p.name != "module.cc")
HEADERS = [*(ROOT / "src" / "ffi").glob("*.h"), *(ROOT / "cuda").rglob("*.h"), *HERE.glob("*.h")]
HEADERS += [ROOT / "cuda" / "ops" / f"{op}.cu" for op in PLAIN]
SOURCES = [*HANDLERS, *sorted(HERE.glob("*.cc"))]
COMPILER = os.environ.get("CXX", "g++")
# Hidden: two builds of the same handlers live in one process. No contraction into fused
# multiply-adds: the same bits on every processor.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
# MinGW's own libraries lie where Windows does not look for them.
LINK_FLAGS = ["-shared", *(["-static"] if sys.platform == "win32" else [])]
SUFFIX = sysconfig.get_config_var("SHLIB_SUFFIX") or ".dll"


class _Target(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("execute", ctypes.c_void_p),
        ("initialize", ctypes.c_void_p),
    ]


def build(spare_elements: int = 0) -> Path:
    """Compiles the double, unless these sources were compiled before; returns the library.

    Several processes may call it at once: one compiles, the others wait.

    Args:
      spare_elements: 1 builds the handlers that tests call with shifted pointers: every array has
        one entry more along its first dimension, and its data begin at the second element.
    """
    flags = [
        *FLAGS,
        "-DSYNTONIC_HOST",
        f"-DSYNTONIC_SPARE_ELEMENTS={spare_elements}",
        f"-I{ROOT / 'cuda'}",
        f"-I{ROOT / 'src' / 'ffi'}",
        f"-isystem{jax.ffi.include_dir()}",
    ]
    return library_of("double", flags, [*SOURCES, *HEADERS], lambda _: (SOURCES, []))


def library_of(
    name: str,
    flags: list[str],
    read: Iterable[Path],
    sources: Callable[[Path], tuple[list[Path], list[str]]],
) -> Path:
    """Compiles a library into build/, unless one of the same was compiled before.

    Args:
      name: its folder there.
      flags: of the compiler.
      read: the files that what it does depends on.
      sources: makes what is compiled in a scratch folder, and more flags.
    """
    digest = hashlib.sha256(" ".join([jax.__version__, COMPILER, *flags]).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / name
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".dll"
    library = folder / f"{digest.hexdigest()[:16]}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made, more = sources(Path(scratch))
                _compile([*flags, *more], made, Path(scratch), library)
    return library


def _compile(flags: list[str], sources: list[Path], scratch: Path, library: Path) -> None:
    def compile_one(source: Path) -> Path:
        out = scratch / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([COMPILER, *flags, "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = scratch / library.name
    subprocess.run([COMPILER, *LINK_FLAGS, *objects, "-o", linked], check=True)
    linked.rename(library)


def targets(library: Path) -> dict[str, dict[str, object]]:
    """{target: {stage: capsule}} of a library, as jax.ffi.register_ffi_target takes them."""
    exported = ctypes.CDLL(str(library)).syntonic_targets
    exported.restype = ctypes.POINTER(_Target)
    count = ctypes.c_int64()
    table = exported(ctypes.byref(count))

    def capsule(address):
        return jax.ffi.pycapsule(ctypes.c_void_p(address))

    return {
        target.name.decode(): {
            "execute": capsule(target.execute),
            "initialize": capsule(target.initialize),
        }
        for target in table[: count.value]
    }


@functools.cache
def register(spare_elements: int = 0, suffix: str = "") -> None:
    """Registers the targets, their names followed by `suffix`, for platform cpu."""
    for name, stages in targets(build(spare_elements)).items():
        jax.ffi.register_ffi_target(name + suffix, stages, platform="cpu")
        jax.ffi.register_ffi_target_as_batch_partitionable(name + suffix)


@functools.cache
def install() -> None:
    """Has `implementation="cuda"` call the double on platform cpu."""
    from syntonic_jax import _primitive

    register()
    _primitive.lower_kernels_on("cpu")
