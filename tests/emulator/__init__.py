"""The kernels themselves on a CPU: the handlers of src/ffi over cuda/, compiled as C++.

A launch runs the threads of a block as fibers (emulator.h). That shows whether a kernel computes
what it should, for every type and shape, on a machine without a GPU; it shows nothing of clusters,
background copies, memory access or speed.
"""

import functools
import re
import sys
from pathlib import Path

import double
import jax

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "cuda"
KERNELS = sorted(CUDA.rglob("*.cu"))
HEADERS = sorted([*CUDA.rglob("*.h"), *CUDA.rglob("*.cuh")])
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\([^)]*\) )?(\w+) (\w+)\[\];")
# CUDA's own headers, all of which the emulator's stands for.
REPLACED = ("cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h")
SOURCES = [*double.HANDLERS, double.HERE / "exports.cc", HERE / "emulator.cc"]
FLAGS = [*double.FLAGS, "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-variable"]


def _translate(folder: Path) -> list[Path]:
    """Copies cuda/ to a folder, in C++; returns the kernels."""
    translated = []
    for path in [*KERNELS, *HEADERS]:
        text = DYNAMIC_SHARED.sub(
            r"\1* const \2 = static_cast<\1*>(emulator::dynamic_shared());", path.read_text()
        )
        if path.suffix != ".h":
            text = '#include "emulator.h"\n' + text
        target = folder / path.relative_to(CUDA)
        if path.suffix == ".cu":
            target = target.with_suffix(".cc")
            translated.append(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for name in REPLACED:
        (folder / name).write_text("")
    return translated


def build() -> Path:
    """Compiles the emulated kernels, unless they were compiled before; returns the library."""

    def sources(scratch: Path) -> tuple[list[Path], list[str]]:
        kernels = _translate(scratch / "cuda")
        return [*SOURCES, *kernels], [f"-I{scratch / 'cuda'}"]

    flags = [*FLAGS, "-DSYNTONIC_HOST", "-DSYNTONIC_SPARE_ELEMENTS=0"]
    flags += [f"-I{HERE}", f"-I{double.HERE}", f"-I{ROOT / 'src' / 'ffi'}"]
    flags += [f"-isystem{jax.ffi.include_dir()}"]
    read = [*SOURCES, *KERNELS, *HEADERS, *double.HEADERS, *HERE.glob("*.*")]
    return double.library_of("emulator", flags, read, sources)


@functools.cache
def targets() -> dict[str, dict[str, object]]:
    """{target: {stage: capsule}}."""
    return double.targets(build())


def available() -> bool:
    """Whether this is a machine for it: the fibers are those of the C library of Linux."""
    return sys.platform == "linux"
