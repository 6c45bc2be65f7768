"""What only the machine code tells: that the compiler has left a load behind the wait before it."""

import importlib
import re
import shutil
import subprocess

import jax
import pytest

pytestmark = pytest.mark.gpu

WAIT = "ACQBULK"
# Its parameters are older than the launch before it, which has waited itself.
READS_BEFORE = "merge_channels"


def kernels_in(extension: str, architecture: str) -> dict[str, str]:
    """The instructions of every kernel, by mangled name."""
    cuobjdump = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    command = [cuobjdump, "-sass", "-arch", architecture, extension]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(part.split("\n", 1) for part in listing.split("Function : ")[1:])


def touches_memory_before_waiting(instructions: str) -> bool:
    before, _, _ = instructions.partition(WAIT)
    return re.search(r"\b(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED)\b", before) is not None


def test_memory_is_touched_after_the_launch_before():
    """Launches overlap: what the one before writes is there only behind the wait for it."""
    capability = jax.devices("gpu")[0].compute_capability
    extension = importlib.import_module("syntonic_jax._kernels").__file__
    kernels = kernels_in(extension, f"sm_{capability.replace('.', '')}")
    assert len(kernels) > 100
    overlap = float(capability) >= 9  # elsewhere there is nothing to wait for
    assert {name for name, code in kernels.items() if (WAIT in code) != overlap} == set()
    early = {name for name, code in kernels.items() if touches_memory_before_waiting(code)}
    assert not overlap or all(READS_BEFORE in name for name in early), early
