"""Where a result comes from: machine, versions, commit."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lib.runs import fingerprint

PACKAGES = ("torch", "numpy", "pandas")  # whose versions may move a number, with any engine


def environment(device: str, dtype: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Machine and versions as this process has them; names no host, user or folder.

    Args: packages: whose versions count besides PACKAGES.
    """
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "",
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(packages),
    }


@functools.cache
def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def versions(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """Python and the packages that compute, `packages` among them."""
    found = {package: metadata.version(package) for package in (*PACKAGES, *packages)}
    return {"python": platform.python_version(), **found}


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The commit checked out ("" outside a git repository)."""
    return _git("rev-parse", "HEAD").strip()


def uncommitted(paths: Iterable[str]) -> list[str]:
    """Those files under `paths` (from the root) that differ from the commit or are not in it.

    Published results are left out: publishing one chapter must not stop the next.
    """
    inside = sorted({str(path) for path in paths if (fingerprint.ROOT / path).exists()})
    if not inside or not commit():
        return []
    options = ("status", "--porcelain", "--untracked-files=all", "--no-renames", "-z", "--")
    entries = _git(*options, *inside, ":(exclude)data/results").split("\0")
    return sorted(entry[3:] for entry in entries if entry)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(fingerprint.ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (subprocess.CalledProcessError, FileNotFoundError):
        return ""
