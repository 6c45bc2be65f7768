"""Scripts in a Python of their own."""

import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def run_fresh(script: str):
    """Runs it with the package that this process has; what tests share can be imported."""
    paths = [str(TESTS), str(TESTS / "support")]
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"import sys; sys.path += {paths!r}\n{textwrap.dedent(script)}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
