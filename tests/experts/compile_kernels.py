"""Compile the Triton kernels for GPUs without one, and print what came out: a JSON object a line.

    python -m tests.experts.compile_kernels 90 bf16 [--first | --smaller]

Apart from pytest: there, Triton's own functions are the interpreter's.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from evomoe_plugin.experts.kernels.cuda import combine
from evomoe_plugin.experts.kernels.cuda import triton_kernels as kernels
from evomoe_plugin.models import vocabulary_kernel
from evomoe_plugin.routing.kernels import best, noise, pairs, sums, tiles

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
COUNTS = {"num_tiles", "N", "num_pieces", "most", "width"}
SIZES = {"D", "F", "stride_x", "stride_grad"}  # multiples of 16 here, as in most models
POINTERS = {
    **dict.fromkeys(("token_ids", "seed", "counts"), "*i64"),
    **dict.fromkeys(("tiles", "table", "segments", "tile_starts"), "*i32"),
    **dict.fromkeys(("dots", "bias_sums", "parts", "weights"), "*fp32"),
}
OPTIONS = {
    "E": 64,
    "ROWS": 128,
    "GROUP": kernels.GROUP,
    "KIND": "gelu",
    "HAS_IDS": True,
    "HAS_BIAS": True,
    "HAS_WEIGHTS": True,
    "IS_GATED": False,
    "IS_SUM": False,
    "DROPS": False,
    "KEEPS": True,
}
GATED = {"IS_GATED": True, "IS_SUM": True, "KIND": "silu", "HAS_BIAS": False}
CASES = [
    ("up", {}),
    ("gated_up", GATED),
    ("down", {}),
    ("down", {**GATED, "HAS_WEIGHTS": False}),
    ("down_backward", {}),
    ("down_backward", GATED),
    ("weight_gradient", {}),
]
# As launched for few rows an expert and, in fp32, where TF32 is not allowed.
SMALLER = [{"ROWS": 16}, {"ROWS": 64}]
EXACT = [{"ROWS": rows, "PRECISION": "ieee"} for rows in (16, 128)]
# Without products, and not tuned.
OTHERS = [
    ("schedule", {"E": 64, "BE": 64, "BLOCK": 16, "ONLY_LONG": False}),
    ("schedule", {"E": 1000, "BE": 1024, "BLOCK": 16, "ONLY_LONG": True}),
    ("output_bias_backward", {"BN": 64}),
    ("sum_tiles", {"BN": 128, "SKIPS_EMPTY": False}),
]
# The others: constants of every launch, in all combinations, and types of arguments that are not
# int32 (None: the dtype that is asked for).
TILES = [
    {"ROWS": tile.rows, "WIDTH": tile.width}
    for tile in (tiles.Tiles.of(4096, 64), tiles.Tiles.of(4096, 1000))
]
TYPES = {
    **dict.fromkeys(
        "keys token_ids expert_ids tokens_per_expert order starts targets".split(), "*i64"
    ),
    **dict.fromkeys(("counts", "places"), "*i32"),
    **dict.fromkeys(("mask", "token_mask"), "*u8"),
    **dict.fromkeys(("scales", "smoothed", "plain"), "*fp32"),
    **dict.fromkeys(
        "weights weights_of_pairs grad_of_pairs scores probs checked logits rows".split()
    ),
    **dict.fromkeys(("first", "second", "third"), "i64"),
    **dict.fromkeys(("tiny", "smoothing", "of_others"), "fp32"),
}
BOTH = (True, False)
FURTHER = [
    (noise._fold_all, "*i64", {"PARTS": (1, 2, 3), "BLOCK": (noise._BLOCK,)}),
    (noise._draw, "*fp32", {"IS_GUMBEL": BOTH, "BLOCK": (noise._BLOCK,)}),
    (pairs._count, None, {"TILE": TILES}),
    (pairs._write, None, {"TILE": TILES, "BLOCK": (pairs._BLOCK,)}),
    (pairs._spread, None, {"BLOCK": (pairs._BLOCK,)}),
    (best._best, "*i8", {"TILE": TILES, "K": (1, 8)}),
    (sums._sum, "*fp64", {"TILE": TILES, "HAS_TOKEN_MASK": BOTH, "SCALARS": (sums.SCALARS,)}),
    (combine._kernel, None, {"has_weights": BOTH, "block": (combine._WIDTH,)}),
    (
        vocabulary_kernel._differentiate,
        None,
        {"IS_SMOOTHED": BOTH, "IS_SCALED": BOTH, "BLOCK": (vocabulary_kernel._BLOCK,)},
    ),
]


def further(values: dict) -> list[dict]:
    """The constants of all launches."""
    chosen = (dict(zip(values, one, strict=True)) for one in itertools.product(*values.values()))
    return [{**constants.pop("TILE", {}), **constants} for constants in chosen]


def types_of(function, out: str | None, dtype: str) -> dict[str, str]:
    """The type of every argument, were it no constant."""
    kinds = {name: {**TYPES, "out": out}.get(name, "i32") for name in function.arg_names}
    if "probs" in kinds:  # there is no logarithm of half precision
        kinds["probs"] = "*fp64" if dtype == "fp64" else "*fp32"
    return {name: kind or f"*{dtype}" for name, kind in kinds.items()}


def compiled_further(function, out, constants: dict, dtype: str, size: int | None, capability: int):
    """A launch as Triton compiles it where sizes and strides are 1, multiples of 16 or any."""
    names, types, attributes = function.arg_names, types_of(function, out, dtype), {}
    if size == 1:  # as of a single token: Triton takes them for constants
        ones = [name for name in names if types[name] == "i32" and name not in constants]
        ones += constants.keys() & {"ROWS", "WIDTH", "BLOCK", "block"}
        constants = {**constants, **dict.fromkeys(ones, 1)}
    if size == 16:
        variable = [name for name in names if name not in constants]
        of_16 = [name for name in variable if types[name] == "i32" or types[name][0] == "*"]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in of_16}
    return triton.compile(
        ASTSource(
            function,
            {**types, **dict.fromkeys(constants, "constexpr")},
            {(names.index(name),): value for name, value in constants.items()},
            attributes,
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8 if function is vocabulary_kernel._differentiate else 4},
    )


def launches_further(dtype: str, only_one: bool):
    """Arguments of `compiled_further`; with `only_one`, one of each function, of a single token."""
    for i, (function, out, values) in enumerate(FURTHER):
        constants = further(values)
        if only_one:
            yield function, out, constants[0], ("bf16", "fp16", "fp32")[i % 3], 1
            continue
        dtypes = [dtype]
        if types_of(function, out, "fp16") == types_of(function, out, "bf16"):
            dtypes = ["bf16"] if dtype == "bf16" else []
        elif dtype == "fp32" and function in (pairs._write, pairs._spread, best._best, sums._sum):
            dtypes.append("fp64")
        for each in dtypes:
            yield from ((function, out, chosen, each, 16) for chosen in constants)
            yield from ((function, out, constants[0], each, size) for size in (1, None))


def compiled(name: str, options: dict, config: triton.Config, dtype: str, capability: int):
    """The kernel as Triton compiles it for rows of 16 bytes."""
    kernel = getattr(kernels, name)
    function = kernel.fn if isinstance(kernel, Autotuner) else kernel
    precision = {"PRECISION": "tf32" if dtype == "fp32" else "ieee"}
    constants = {**OPTIONS, **precision, **options, **config.kwargs}
    signature, attributes = {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("dropout", "scale"):
            signature[argument] = "fp32"
        elif argument in COUNTS:
            signature[argument] = "i32"
        else:
            of_pointer = POINTERS.get(argument, f"*{dtype}")
            signature[argument] = "i32" if argument in SIZES else of_pointer
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(i,): constants[a] for i, a in enumerate(function.arg_names) if a in constants}
    return triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def facts(kernel, multiplies: bool) -> dict[str, int | bool]:
    """Resources of a compiled kernel and, if it multiplies matrices, its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])

        def output(tool: str, option: str) -> str:
            command = [TOOLS / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output("cuobjdump", "-res-usage")))
        code = output("nvdisasm", "-c") if multiplies else ""
    return {
        "multiplies": multiplies,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),  # of spilled registers too
        "shared": kernel.metadata.shared,
        "matrix_instructions": len(re.findall(r"\bHG?MMA\b", code)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "asynchronous_loads": len(re.findall(r"\bLDGSTS\b", code)),
    }


def tell(name: str, config: object, kernel, multiplies: bool = False) -> dict:
    case = {"kernel": name, "config": str(config), **facts(kernel, multiplies)}
    print(json.dumps(case), flush=True)
    return case


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("dtype", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--first", action="store_true", help="of kernels with products only one")
    parser.add_argument("--smaller", action="store_true", help="products of other launches")
    args = parser.parse_args()
    if args.smaller:
        given = [*SMALLER, *(EXACT if args.dtype == "fp32" else [])]
        for (name, options), launch in itertools.product(CASES, given):
            for config in getattr(kernels, name).configs:
                kernel = compiled(name, {**options, **launch}, config, args.dtype, args.capability)
                if not tell(f"{name} {options} {launch}", config, kernel, multiplies=True)["stack"]:
                    break
        sys.exit()
    for function, out, *config in launches_further(args.dtype, args.first):
        kernel = compiled_further(function, out, *config, args.capability)
        tell(f"{function.__module__}.{function.__name__}", config, kernel)
    for name, options in CASES[: 1 if args.first else None]:
        for config in getattr(kernels, name).configs[: 1 if args.first else None]:
            kernel = compiled(name, options, config, args.dtype, args.capability)
            tell(f"{name} {options}", config, kernel, multiplies=True)
    for name, options in [] if args.first else OTHERS:
        config = triton.Config({}, num_warps=8 if name == "schedule" else 4)
        kernel = compiled(name, options, config, args.dtype, args.capability)
        tell(f"{name} {options}", config, kernel)
