"""Describe the machine of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "fairscale", "ve-fairseq", "numpy")


def machine(device: str) -> dict[str, str]:
    """Date, processor, system, versions."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu(),
        "cores": str(os.cpu_count()),
        "bf16 instructions": ", ".join(bf16_instructions()) or "none",
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: version(name) for name in PACKAGES}


def cpu() -> str:
    """The processor's model name."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.M)
    return match.group(1).strip() if match else platform.machine()


def bf16_instructions() -> list[str]:
    """Available instructions that make bf16 matmuls faster than fp32."""
    return [flag for flag in ("avx512_bf16", "amx_bf16") if flag in _cpuinfo().split()]


def slug() -> str:
    """The processor's name for file names."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", cpu().lower())).strip("-")


def version(package: str) -> str:
    """Installed version, or 'not installed'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
