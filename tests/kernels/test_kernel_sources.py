"""What every kernel must do, read from its source."""

import re

import emulator
import pytest

pytestmark = pytest.mark.once


def test_every_kernel_waits_for_what_runs_before_it():
    """It is launched early: without the wait it would race, which no run need show."""
    found = 0
    for path in [*emulator.KERNELS, *emulator.HEADERS]:
        for kernel in re.split(r"\n__global__ ", path.read_text())[1:]:
            head, _, body = kernel.partition(") {\n")
            body = body.partition("\n}\n")[0]
            # What merge_channels reads before is older than the kernel whose results it merges.
            first = body if " merge_channels(" in head else body.partition(";")[0] + ";"
            assert "wait_for_launches();" in first, (path.name, head)
            found += 1
    assert found > 20
