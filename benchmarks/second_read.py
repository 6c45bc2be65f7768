"""What of golden_batch_norm's second read of x comes from the L2 cache, by a hardware counter.

    python benchmarks/second_read.py

Needs Nsight Compute (`ncu`) and leave to read counters. Writes `second_read` into the results that
benchmarks/run.py has stored for this device: dram_read_bytes is the median of six calls, where
array_bytes are read.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the device
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import jax
import run
from figures import RESULTS

OP, DTYPE, SHAPE = "golden_batch_norm", "bfloat16", (64, 56, 56, 256)
KERNELS = {"cuda": "normalise", "default": "fusion"}  # in the name of what makes y
METRIC = "dram__bytes_read.sum"
NCU = ["ncu", "--cache-control", "none", "--clock-control", "none", "--metrics", METRIC]


def calls(implementation: str) -> None:
    """What is counted: two arrays take turns, so that none finds what the call before it left."""
    case = cases.Case(OP, "forward", DTYPE, SHAPE, implementation)
    f, operands = case.call(0)
    compiled = jax.jit(f).lower(*operands).compile()
    both = operands, case.call(1)[1]
    for i in range(6):
        jax.block_until_ready(compiled(*both[i % 2]))


def counted(implementation: str) -> dict[str, list[int]]:
    """Bytes that every call of every kernel read from device memory."""
    done = subprocess.run(
        [*NCU, "--csv", "--page", "raw", sys.executable, __file__, "--calls", implementation],
        check=True,
        capture_output=True,
        text=True,
    )
    header, units, *rows = (r for r in csv.reader(done.stdout.splitlines()) if len(r) > 10)
    name, value = header.index("Kernel Name"), header.index(METRIC)
    assert units[value] == "byte", units[value]
    found = defaultdict(list)
    for row in rows:
        found[row[name]].append(int(row[value].replace(",", "")))
    return found


def record(implementation: str) -> dict:
    array_bytes = cases.Case(OP, "forward", DTYPE, SHAPE, implementation).ideal_bytes // 3
    # What makes y is the one of that name which reads about as much as there is.
    ((kernel, read),) = (
        (kernel, read)
        for kernel, read in counted(implementation).items()
        if KERNELS[implementation] in kernel and min(read) > array_bytes / 2
    )
    return {
        "op": OP,
        "dtype": DTYPE,
        "shape": list(SHAPE),
        "implementation": implementation,
        "kernel": kernel,
        "array_bytes": array_bytes,
        "dram_read_bytes": int(statistics.median(read)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="L2 hits of a batch norm's second read")
    parser.add_argument("--calls", choices=KERNELS, help="make the calls that are counted")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are")
    options = parser.parse_args()
    if options.calls:
        return calls(options.calls)
    path = options.out / f"{run.stem(jax.devices()[0])}.json"
    results = json.loads(path.read_text())
    results["second_read"] = [record(implementation) for implementation in KERNELS]
    for found in results["second_read"]:
        share = 1 - found["dram_read_bytes"] / found["array_bytes"]
        print(f"{found['implementation']:8} {share:.1%} from the L2 cache  {found['kernel']}")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
