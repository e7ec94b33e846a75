"""`evomoe doctor`: versions, devices, fast paths and patches, and what is wrong, with the fix."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import evomoe_plugin

# States of a row, from good to bad. STOP: training cannot work.
OK, OFF, FIX, STOP = "ok", "off", "fix", "STOP"

FAIRSEQS = ("ve-fairseq", "fairseq-fixed", "fairseq", "fairseq-light", "fairseq-built")
# Distribution to module.
TRAINING_NEEDS = {
    "torch": "torch",
    "fairscale": "fairscale",
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "numpy": "numpy",
}
DATA_NEEDS = {"pyarrow": "pyarrow", "iopath": "iopath", "sentencepiece": "sentencepiece"}
VECTOR_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Row:
    group: str
    name: str
    found: str
    state: str = OK
    remark: str = ""


_version, _device, _backend, _fast_path, _patch = (
    partial(Row, group) for group in ("versions", "devices", "backends", "fast paths", "patches")
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 1 if training cannot work, 0 otherwise."
    parser.add_argument("--json", action="store_true", help="print it for programs")


def run(args: argparse.Namespace) -> int:
    rows = diagnosis()
    stops = [row.name for row in rows if row.state == STOP]
    fixes = [row.name for row in rows if row.state == FIX]
    if args.json:
        print(
            json.dumps(
                {"training_works": not stops, "rows": [asdict(row) for row in rows]}, indent=2
            )
        )
    else:
        print(as_table(rows), end="")
        print(
            f"Training cannot work here until this is fixed: {', '.join(stops)}."
            if stops
            else "Training can work here."
        )
        if fixes:
            print(f"Fix recommended: {', '.join(fixes)}.")
    return 1 if stops else 0


def diagnosis() -> list[Row]:
    """Every row of the table, in its order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows say what torch would warn of
        with contextlib.suppress(Exception):  # it is in `fairseq_error`
            evomoe_plugin.register()
        rows = list(versions())
        torch = sys.modules.get("torch")
        if torch is not None:
            rows += [*devices(torch), *backends(torch), *fast_paths(torch)]
    return rows + list(patches())


def as_table(rows: list[Row]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {OK: "green", OFF: "dim", FIX: "yellow", STOP: "bold red"}
    table = Table(box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column()
    table.add_column("why, or what to do", overflow="fold")
    for group, members in groupby(rows, key=lambda row: row.group):
        table.add_row(group, style="bold")
        for row in members:
            state = Text(row.state, colours[row.state])
            table.add_row(f"  {row.name}", row.found, state, row.remark)
        table.add_row()
    console = Console(markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def versions() -> Iterator[Row]:
    required = requirements()
    yield _version("Python", platform.python_version(), OK, sys.executable)
    remark = "" if required else "; not installed: its requirements are unknown"
    yield _version(
        "evomoe_plugin",
        evomoe_plugin.__version__,
        OK if required else OFF,
        f"{Path(evomoe_plugin.__file__).parent}{remark}",
    )
    yield fairseq_row(required)
    for needs, if_wrong in ((TRAINING_NEEDS, STOP), (DATA_NEEDS, FIX)):
        for name, module in needs.items():
            yield package_row(name, module, required.get(name, ""), if_wrong)
    yield transformers_row()


def requirements() -> dict[str, str]:
    """Name to version specifier of what the plugin of fairseq needs on this Python and platform.

    Empty when the package runs from a folder that was never installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        texts = metadata.requires("evomoe_plugin") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = map(Requirement, texts)
    return {
        canonicalize_name(r.name): str(r.specifier)
        for r in parsed
        if r.marker is None or r.marker.evaluate({"extra": "fairseq"})
    }


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_row(name: str, module: str, specifier: str, if_wrong: str) -> Row:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    version = version_of(name)
    if version is None or not SpecifierSet(specifier).contains(version, prereleases=True):
        return _version(name, version or "missing", if_wrong, f"pip install '{name}{specifier}'")
    try:
        import_module(module)
    except Exception as error:
        again = f"pip install --force-reinstall '{name}=={Version(version).public}'"
        return _version(name, version, if_wrong, f"{_one_line(error)}; {again}")
    return _version(name, version)


def transformers_row() -> Row:
    """Whether the models of transformers can be imported, which the package itself loads lazily."""
    version = version_of("transformers")
    if version is None:
        remark = "optional, for exported models; pip install transformers"
        return _version("transformers", "missing", OFF, remark)
    try:
        from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401
    except Exception as error:
        fix = "pip install --force-reinstall transformers"
        if "torchaudio" in str(error):
            fix = (
                "pip uninstall -y torchaudio, whose build does not fit this torch; fairseq "
                "needs it for speech alone"
            )
        return _version("transformers", version, FIX, f"{_one_line(error)}; {fix}")
    return _version("transformers", version, OK, "its models can be imported")


def fairseq_row(required: dict[str, str]) -> Row:
    """Which fairseq is installed, whether it can be imported, and which one fits this Python."""
    right = next((name for name in FAIRSEQS if name in required), FAIRSEQS[0])
    installed = [name for name in FAIRSEQS if version_of(name)]
    found = ", ".join(f"{name} {version_of(name)}" for name in installed)
    fix = f"pip install --force-reinstall --no-deps '{right}{required.get(right, '')}'"
    if others := " ".join(name for name in installed if name != right):
        fix = f"pip uninstall -y {others}; {fix}"
    error = evomoe_plugin.fairseq_error
    if error is not None:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0]
        if installed and absent not in (False, "fairseq"):
            fix = "a dependency of fairseq is missing; make venv builds a complete environment"
        return _version("fairseq", found or "missing", STOP, f"{_one_line(error)}; {fix}")
    if len(installed) > 1:
        return _version("fairseq", found, FIX, f"they overwrite each other's files; {fix}")
    return _version("fairseq", found or "of no known distribution")


def devices(torch: ModuleType) -> Iterator[Row]:
    cpu = cpu_info()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield _device(
        "CPU",
        cpu["model"],
        OK,
        f"{usable} usable of {os.cpu_count()} processors, {cpu['cores']} cores",
    )
    threads = os.environ.get("OMP_NUM_THREADS")
    remark = "OMP_NUM_THREADS is not set; ranks on the CPU will share the processors"
    yield _device(
        "threads",
        str(torch.get_num_threads()),
        OK,
        f"OMP_NUM_THREADS={threads}" if threads else remark,
    )
    units = sorted(flag for flag in cpu["flags"] if re.fullmatch("amx_.*|sme2?", flag))
    yield _device("matrix units", " ".join(units) or "none", OK if units else OFF)
    vectors = " ".join(flag for flag in VECTOR_UNITS if flag in cpu["flags"])
    yield _device(
        "vector units",
        vectors or "unknown",
        OK,
        f"torch uses {torch.backends.cpu.get_cpu_capability()}",
    )
    yield from gpus(torch)


def cpu_info() -> dict[str, Any]:
    """`model`, `cores` (physical, or "?") and `flags` of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    values = dict(reversed(pairs))  # of the first processor
    sockets, cores = (
        [value for key, value in pairs if key == name] for name in ("physical id", "core id")
    )
    return {
        "model": values.get("model name") or platform.processor() or platform.machine(),
        "cores": len(set(zip(sockets, cores, strict=True))) or "?",
        "flags": set(values.get("flags", values.get("Features", "")).split()),
    }


def gpus(torch: ModuleType) -> Iterator[Row]:
    build = torch.version.cuda or getattr(torch.version, "hip", None)
    kind = f"built for CUDA {build}" if build else "a CPU build"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield _device(
                f"GPU {index}",
                gpu.name,
                OK,
                f"{gpu.total_memory / 2**30:.0f} GiB, SM {gpu.major}{gpu.minor}, "
                f"{gpu.multi_processor_count} multiprocessors",
            )
    elif Path("/dev/nvidiactl").exists():
        fix = (
            " and cannot use it: is the driver too old, or CUDA_VISIBLE_DEVICES empty?"
            if build
            else "; make venv TORCH=cuda installs the CUDA build"
        )
        yield _device("GPU", "NVIDIA's driver", FIX, f"this torch is {kind}{fix}")
    else:
        yield _device("GPU", "none", OFF, f"training runs on the CPU; torch is {kind}")


def backends(torch: ModuleType) -> Iterator[Row]:
    has, on_gpu = torch.distributed.is_available(), torch.cuda.is_available()
    if has and torch.distributed.is_gloo_available():
        yield _backend("gloo", "yes", OK, "several ranks on the CPU")
    else:
        yield _backend(
            "gloo",
            "no",
            FIX,
            "this torch cannot train with several ranks on the CPU; take another build",
        )
    nccl = has and torch.distributed.is_nccl_available()
    yield _backend(
        "nccl",
        "yes" if nccl else "no",
        OK if nccl else FIX if on_gpu else OFF,
        "several ranks on GPUs",
    )


def fast_paths(torch: ModuleType) -> Iterator[Row]:
    from evomoe_plugin.experts.kernels.cuda import why_not_fused
    from evomoe_plugin.experts.precision import INSTRUCTIONS

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    flags = cpu_info()["flags"]
    units = [flag for flag in INSTRUCTIONS[torch.bfloat16] if flag in flags]
    if capability:
        units = [f"SM {capability[0]}{capability[1]}"] if capability >= (8, 0) else []
    if units:
        yield _fast_path("bf16 matmul", units[0], OK, "--moe-matmul-dtype bf16")
    else:
        yield _fast_path("bf16 matmul", "in fp32, rounded", OFF, "fp32 is faster here")
    if capability:
        reason = why_not_fused(torch.device("cuda"), torch.bfloat16, "gelu")
        yield _fast_path(
            "Triton kernels", "no" if reason else "experts", OFF if reason else OK, reason
        )
        cuda = torch.backends.cuda
        on = {
            "flash": cuda.flash_sdp_enabled(),
            "cuDNN": cuda.cudnn_sdp_enabled(),
            "memory-efficient": cuda.mem_efficient_sdp_enabled(),
        }
        kernels = ", ".join(name for name in on if on[name])
        yield _fast_path("attention", kernels or "plain", OK if kernels else OFF)
    else:
        yield _fast_path(
            "Triton kernels", "no", OFF, "for GPUs; here experts are computed in chunks of tokens"
        )
        yield _fast_path(
            "attention",
            "flash",
            OK,
            "block by block, in evomoe_plugin, while attention dropout is on",
        )
    kind, where = apex_kind()
    if kind == "unrelated":
        yield _fast_path(
            "apex",
            where,
            FIX,
            "PyPI's apex is a toolkit for the Pyramid web framework, not NVIDIA's: "
            "pip uninstall apex. NVIDIA's is optional and built from source.",
        )
    elif kind is None:
        yield _fast_path("apex", "no", OFF, "NVIDIA's is optional and built from source")
    else:
        yield _fast_path("apex", "NVIDIA's", OK, where)
    if evomoe_plugin.fairseq_error is not None:
        return
    from fairseq.optim.fused_adam import get_fused_adam_class

    from evomoe_plugin.models.vocabulary_loss import CHUNKS

    sizes = ", ".join(f"{size} on {device}" for device, size in CHUNKS.items())
    yield _fast_path(
        "vocabulary loss",
        "in chunks",
        OK,
        f"tokens whose logits are in memory at once: {sizes}; --criterion moe_cross_entropy",
    )
    if capability and get_fused_adam_class() is not None:
        yield _fast_path("fused Adam", "apex's", OK, "--optimizer fused_adamw, and adam on GPUs")
    else:
        yield _fast_path(
            "fused Adam",
            "torch's",
            OK,
            "--optimizer fused_adamw; adam is fairseq's own, and several times slower",
        )


def apex_kind() -> tuple[str | None, str]:
    """("nvidia" | "unrelated" | None, folder): which `apex` an import would find.

    Without importing it: PyPI's fails, or starts a web framework.
    """
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    if not folders:
        return None, ""
    nvidia = any((folder / "optimizers").is_dir() for folder in folders)
    return "nvidia" if nvidia else "unrelated", str(folders[0])


def patches() -> Iterator[Row]:
    if evomoe_plugin.fairseq_error is not None:
        yield _patch("all", "not applied", OFF, "there is no fairseq to patch")
        return
    from evomoe_plugin.patches import report

    for status in report():
        yield _patch(
            status.name, *(("active", OK) if status.active else ("inactive", OFF)), status.reason
        )


def _one_line(error: Exception) -> str:
    text = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"
