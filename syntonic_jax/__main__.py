"""``python -m syntonic_jax``: what this installation is, and what it does on this machine."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import jax

from . import _dispatch, _extension


def kernels() -> dict:
    """What is compiled in. Looks at no device."""
    return {
        "loaded": _extension.available(),
        "reason": _extension.reason(),
        "kernels": list(_extension.kernels()),
        "architectures": list(_extension.architectures()),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that this one stands on."""
    packages = ("syntonic-jax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a plugin that is not installed, or a source tree
    return found


def devices() -> list[dict]:
    """The devices that jax uses, and what `implementation=None` selects on each."""
    return [describe(device) for device in jax.devices()]


def describe(device: Any) -> dict:
    """One device: compute capability is None where there is no such thing."""
    capability = getattr(device, "compute_capability", None)
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "compute_capability": capability,
        "implementations": {
            operation: _dispatch.selected(operation, device.platform, capability)
            for operation in _dispatch.OPERATIONS
        },
    }


def kernel_lines(found: dict) -> Iterable[str]:
    """`kernels()` for people."""
    if not found["loaded"]:
        yield f"kernels        none: {found['reason']}"
        return
    yield f"kernels        {', '.join(found['kernels'])}"
    yield f"architectures  {', '.join(found['architectures'])}"


def device_lines(found: list[dict]) -> Iterable[str]:
    """`devices()` for people: a line for each, then what is selected for each operation."""
    for device in found:
        capability = device["compute_capability"]
        suffix = f", compute capability {capability}" if capability else ""
        yield f"device {device['id']:<7} {device['platform']}: {device['kind']}{suffix}"
    yield ""
    yield "what implementation=None selects, by device:"
    width = max(map(len, _dispatch.OPERATIONS))
    for operation in _dispatch.OPERATIONS:
        chosen = "  ".join(f"{d['id']}: {d['implementations'][operation]}" for d in found)
        yield f"  {operation:<{width}}  {chosen}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m syntonic_jax", description="What this installation of syntonic-jax is."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--kernels", action="store_true", help="only what is compiled in; looks at no device"
    )
    options = parser.parse_args(arguments)

    report: dict = {"extension": kernels()}
    if not options.kernels:
        report = {"versions": versions(), **report, "devices": devices()}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for package, version in report.get("versions", {}).items():
        print(f"{package:<14} {version}")
    for line in kernel_lines(report["extension"]):
        print(line)
    if "devices" in report:
        for line in device_lines(report["devices"]):
            print(line)


if __name__ == "__main__":
    main()
