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
from importlib import import_module, metadata
from itertools import groupby
from pathlib import Path

import evomoe_plugin

# States of a row, from good to bad. STOP: training cannot work.
OK, OFF, FIX, STOP = "ok", "off", "fix", "STOP"

FAIRSEQS = ("ve-fairseq", "fairseq-fixed", "fairseq", "fairseq-light", "fairseq-built")
# Distribution to module.
TRAINING_NEEDS = {"torch": "torch", "fairscale": "fairscale", "hydra-core": "hydra",
                  "omegaconf": "omegaconf", "numpy": "numpy"}
DATA_NEEDS = {"pyarrow": "pyarrow", "iopath": "iopath", "sentencepiece": "sentencepiece"}


@dataclass(frozen=True)
class Row:
    group: str
    name: str
    found: str
    state: str = OK
    remark: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 1 if training cannot work, 0 otherwise."
    parser.add_argument("--json", action="store_true", help="print it for programs")


def run(args: argparse.Namespace) -> int:
    rows = diagnosis()
    stops = [row.name for row in rows if row.state == STOP]
    fixes = [row.name for row in rows if row.state == FIX]
    if args.json:
        print(json.dumps({"training_works": not stops, "rows": [asdict(row) for row in rows]},
                         indent=2))
    else:
        print(as_table(rows), end="")
        print(f"Training cannot work here until this is fixed: {', '.join(stops)}." if stops
              else "Training can work here.")
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
        table.add_row(Text(group, "bold"))
        for row in members:
            table.add_row(Text("  " + row.name), Text(row.found),
                          Text(row.state, colours[row.state]), Text(row.remark))
        table.add_row()
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# versions


def versions() -> Iterator[Row]:
    required = requirements()
    yield Row("versions", "Python", platform.python_version(), OK, sys.executable)
    where = Path(evomoe_plugin.__file__).parent
    if required:
        yield Row("versions", "evomoe_plugin", evomoe_plugin.__version__, OK, str(where))
    else:
        yield Row("versions", "evomoe_plugin", evomoe_plugin.__version__, OFF,
                  f"{where}; not installed: its requirements are unknown")
    yield fairseq_row(required)
    for needs, if_wrong in ((TRAINING_NEEDS, STOP), (DATA_NEEDS, FIX)):
        for name, module in needs.items():
            yield package_row(name, module, required.get(name, ""), if_wrong)
    yield transformers_row()


def requirements() -> dict[str, str]:
    """Name to version specifier of what the installed package needs on this Python and platform.

    Empty when the package runs from a folder that was never installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        texts = metadata.requires("evomoe_plugin") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = map(Requirement, texts)
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed
            if r.marker is None or r.marker.evaluate({"extra": ""})}


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_row(name: str, module: str, specifier: str, if_wrong: str) -> Row:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    version = version_of(name)
    install = f"pip install '{name}{specifier}'"
    if version is None:
        return Row("versions", name, "missing", if_wrong, install)
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        return Row("versions", name, version, if_wrong, install)
    try:
        import_module(module)
    except Exception as error:
        again = f"pip install --force-reinstall '{name}=={Version(version).public}'"
        return Row("versions", name, version, if_wrong, f"{_one_line(error)}; {again}")
    return Row("versions", name, version)


def transformers_row() -> Row:
    """Whether the models of transformers can be imported, which the package itself loads lazily."""
    version = version_of("transformers")
    if version is None:
        return Row("versions", "transformers", "missing", OFF,
                   "optional, for exported models; pip install transformers")
    try:
        from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401
    except Exception as error:
        fix = "pip uninstall -y torchaudio, whose build does not fit this torch; fairseq needs " \
              "it for speech alone" if "torchaudio" in str(error) else \
              "pip install --force-reinstall transformers"
        return Row("versions", "transformers", version, FIX, f"{_one_line(error)}; {fix}")
    return Row("versions", "transformers", version, OK, "its models can be imported")


def fairseq_row(required: dict[str, str]) -> Row:
    """Which fairseq is installed, whether it can be imported, and which one fits this Python."""
    right = next((name for name in FAIRSEQS if name in required), FAIRSEQS[0])
    installed = {name: version_of(name) for name in FAIRSEQS}
    installed = {name: version for name, version in installed.items() if version}
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    others = [name for name in installed if name != right]
    install = (f"pip uninstall -y {' '.join(others)}; " if others else "") + \
              f"pip install --force-reinstall --no-deps '{right}{required.get(right, '')}'"

    error = evomoe_plugin.fairseq_error
    if error is not None:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0]
        if installed and absent not in (False, "fairseq"):
            install = "a dependency of fairseq is missing; make venv builds a complete environment"
        return Row("versions", "fairseq", found or "missing", STOP,
                   f"{_one_line(error)}; {install}")
    if len(installed) > 1:
        return Row("versions", "fairseq", found, FIX,
                   f"they overwrite each other's files; {install}")
    return Row("versions", "fairseq", found or "of no known distribution")


# devices and backends


def devices(torch) -> Iterator[Row]:
    cpu = cpu_info()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Row("devices", "CPU", cpu["model"], OK,
              f"{usable} usable of {os.cpu_count()} processors, {cpu['cores']} cores")
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Row("devices", "threads", str(torch.get_num_threads()), OK,
              f"OMP_NUM_THREADS={threads}" if threads else
              "OMP_NUM_THREADS is not set; ranks on the CPU will share the processors")
    units = sorted(flag for flag in cpu["flags"] if re.fullmatch("amx_.*|sme2?", flag))
    yield Row("devices", "matrix units", " ".join(units) or "none", OK if units else OFF)
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "asimd", "sve",
                                 "bf16") if flag in cpu["flags"]]
    yield Row("devices", "vector units", " ".join(vectors) or "unknown", OK,
              f"torch uses {torch.backends.cpu.get_cpu_capability()}")
    yield from gpus(torch)


def cpu_info() -> dict:
    """`model`, `cores` (physical, or "?") and `flags` of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"model": platform.processor() or platform.machine(), "cores": "?", "flags": set()}
    pairs = [[part.strip() for part in line.split(":", 1)] for line in text.splitlines()
             if ":" in line]
    values = dict(reversed(pairs))  # of the first processor
    sockets = [value for key, value in pairs if key == "physical id"]
    cores = [value for key, value in pairs if key == "core id"]
    return {
        "model": values.get("model name", platform.machine()),
        "cores": len(set(zip(sockets, cores, strict=True))) or "?",
        "flags": set(values.get("flags", values.get("Features", "")).split()),
    }


def gpus(torch) -> Iterator[Row]:
    there = Path("/dev/nvidiactl").exists()
    build = torch.version.cuda or getattr(torch.version, "hip", None)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield Row("devices", f"GPU {index}", gpu.name, OK,
                      f"{gpu.total_memory / 2**30:.0f} GiB, SM {gpu.major}{gpu.minor}, "
                      f"{gpu.multi_processor_count} multiprocessors")
    elif there and not build:
        yield Row("devices", "GPU", "NVIDIA's driver", FIX,
                  "this torch is a CPU build; make venv TORCH=cuda installs the CUDA build")
    elif there:
        yield Row("devices", "GPU", "NVIDIA's driver", FIX,
                  f"torch is built for CUDA {build} and cannot use it: is the driver too old, or "
                  "CUDA_VISIBLE_DEVICES empty?")
    else:
        yield Row("devices", "GPU", "none", OFF, "training runs on the CPU; torch is "
                  + (f"built for CUDA {build}" if build else "a CPU build"))


def backends(torch) -> Iterator[Row]:
    has = torch.distributed.is_available()
    gloo = has and torch.distributed.is_gloo_available()
    nccl = has and torch.distributed.is_nccl_available()
    yield Row("backends", "gloo", "yes" if gloo else "no", OK if gloo else FIX,
              "several processes on the CPU" if gloo else
              "this torch cannot train in several processes on the CPU; take another build")
    on_gpu = torch.cuda.is_available()
    yield Row("backends", "nccl", "yes" if nccl else "no",
              OK if nccl else FIX if on_gpu else OFF, "several processes on GPUs")


# fast paths


def fast_paths(torch) -> Iterator[Row]:
    from evomoe_plugin.experts.kernels.cuda.grouped_mm import why_not
    from evomoe_plugin.experts.precision import INSTRUCTIONS

    flags = cpu_info()["flags"]
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    units = [flag for flag in INSTRUCTIONS[torch.bfloat16] if flag in flags]
    if capability:
        units = [f"SM {capability[0]}{capability[1]}"] if capability >= (8, 0) else []
    yield Row("fast paths", "bf16 matmul", units[0] if units else "in fp32, rounded",
              OK if units else OFF,
              "--moe-matmul-dtype bf16" if units else "fp32 is faster here")

    if capability:
        # Widths are a model's own: some that fit.
        reason = why_not(torch.device("cuda"), torch.bfloat16, 512, 2048)
        yield Row("fast paths", "grouped_mm", "no" if reason else "experts in bf16",
                  OFF if reason else OK, reason)
    else:
        yield Row("fast paths", "grouped_mm", "no", OFF,
                  "for GPUs; here experts are computed in chunks of tokens")

    if capability:
        cuda = torch.backends.cuda
        kernels = [name for name, on in (
            ("flash", cuda.flash_sdp_enabled()), ("cuDNN", cuda.cudnn_sdp_enabled()),
            ("memory-efficient", cuda.mem_efficient_sdp_enabled())) if on]
        yield Row("fast paths", "attention", ", ".join(kernels) or "plain", OK if kernels else OFF)
    else:
        yield Row("fast paths", "attention", "flash", OK, "block by block, in evomoe_plugin, while "
                                                          "attention dropout is on")
    yield from vocabulary_rows()
    yield Row("fast paths", "torch.compile", "between experts' matmuls" if capability else "no",
              OK if capability else OFF,
              "" if capability else "it speeds up no part of a step on a CPU")
    yield from adam_rows(torch)


def vocabulary_rows() -> Iterator[Row]:
    if evomoe_plugin.fairseq_error is None:
        from evomoe_plugin.models.vocabulary_loss import CHUNKS

        yield Row("fast paths", "vocabulary loss", "in chunks", OK,
                  "tokens whose logits are in memory at once: "
                  + ", ".join(f"{size} on {device}" for device, size in CHUNKS.items())
                  + "; --criterion moe_cross_entropy")


def adam_rows(torch) -> Iterator[Row]:
    kind, where = apex_kind()
    if kind == "unrelated":
        yield Row("fast paths", "apex", where, FIX,
                  "PyPI's apex is a toolkit for the Pyramid web framework, not NVIDIA's: pip "
                  "uninstall apex. NVIDIA's is optional and built from source.")
    elif kind is None:
        yield Row("fast paths", "apex", "no", OFF,
                  "NVIDIA's is optional and built from source")
    else:
        yield Row("fast paths", "apex", "NVIDIA's", OK, where)
    if evomoe_plugin.fairseq_error is not None:
        return
    from fairseq.optim.fused_adam import get_fused_adam_class

    fused = torch.cuda.is_available() and get_fused_adam_class() is not None
    yield Row("fast paths", "fused Adam", "apex's" if fused else "torch's", OK,
              "--optimizer fused_adamw, and adam on GPUs" if fused else
              "--optimizer fused_adamw; adam is fairseq's own, and several times slower")


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


# patches


def patches() -> Iterator[Row]:
    if evomoe_plugin.fairseq_error is not None:
        yield Row("patches", "all", "not applied", OFF, "there is no fairseq to patch")
        return
    from evomoe_plugin.patches import report

    for status in report():
        yield Row("patches", status.name, "active" if status.active else "inactive",
                  OK if status.active else OFF, status.reason)


def _one_line(error: Exception) -> str:
    text = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"
