"""Compile the Triton kernels for GPUs without one, and print what came out: a JSON object a line.

    python -m tests.experts.compile_kernels 90 bf16 [--first]

Apart from pytest: there, Triton's own functions are the interpreter's.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

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
# Without products, and not tuned.
OTHERS = [
    ("schedule", {"E": 64, "BE": 64, "BLOCK": 16, "ONLY_LONG": False}),
    ("schedule", {"E": 1000, "BE": 1024, "BLOCK": 16, "ONLY_LONG": True}),
    ("output_bias_backward", {"BN": 64}),
    ("sum_tiles", {"BN": 128, "SKIPS_EMPTY": False}),
]
# Of routing and the vocabulary's loss: types of arguments, where not int32, and constants.
_TILE = {"ROWS": tiles.ELEMENTS // 64, "WIDTH": 64}
_LONG = dict.fromkeys("token_ids expert_ids tokens_per_expert order starts".split(), "*i64")
_INT = {"counts": "*i32", "places": "*i32"}
FURTHER = [
    (
        noise._fold_all,
        {
            **dict.fromkeys(("keys", "out"), "*i64"),
            **dict.fromkeys(("first second third".split()), "i64"),
        },
        {"PARTS": 3, "BLOCK": 1024},
    ),
    (noise._draw, {"keys": "*i64", "out": "*fp32"}, {"IS_GUMBEL": True, "BLOCK": 1024}),
    (pairs._count, {"mask": "*u8", **_INT}, _TILE),
    (
        pairs._write,
        {"mask": "*u8", "weights": "*fp32", "weights_of_pairs": "*fp32", **_LONG, **_INT},
        {**_TILE, "BLOCK": 512},
    ),
    (pairs._spread, {"grad_of_pairs": "*fp32", "out": "*fp32", **_INT}, {"BLOCK": 512}),
    (best._best, {"scores": "*fp64", "out": "*i8"}, {**_TILE, "K": 8}),
    (
        sums._sum,
        {
            **dict.fromkeys(("mask", "token_mask"), "*u8"),
            **dict.fromkeys(("probs", "checked"), "*fp32"),
            "out": "*fp64",
            "tiny": "fp32",
        },
        {**_TILE, "SCALARS": sums.SCALARS, "HAS_TOKEN_MASK": True},
    ),
    (
        vocabulary_kernel._differentiate,
        {
            "logits": "*bf16",
            "targets": "*i64",
            **dict.fromkeys(("scales", "smoothed", "plain"), "*fp32"),
            **dict.fromkeys(("smoothing", "of_others"), "fp32"),
        },
        {"IS_SMOOTHED": True, "IS_SCALED": True, "BLOCK": 4096},
    ),
]


def compiled_further(function, types: dict, constants: dict, capability: int):
    names = function.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    return triton.compile(
        ASTSource(function, signature, {(names.index(a),): v for a, v in constants.items()}, {}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4},
    )


def compiled(name: str, options: dict, config: triton.Config, dtype: str, capability: int):
    """The kernel as Triton compiles it for rows of 16 bytes."""
    kernel = getattr(kernels, name)
    function = kernel.fn if isinstance(kernel, Autotuner) else kernel
    precision = "tf32" if dtype == "fp32" else "ieee"
    constants = {**OPTIONS, **options, "PRECISION": precision, **config.kwargs}
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


def facts(kernel) -> dict[str, int]:
    """Resources and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])

        def output(tool: str, option: str) -> str:
            command = [TOOLS / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output("cuobjdump", "-res-usage")))
        code = output("nvdisasm", "-c")
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": kernel.metadata.shared,
        "matrix_instructions": len(re.findall(r"\bHG?MMA\b", code)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "asynchronous_loads": len(re.findall(r"\bLDGSTS\b", code)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("dtype", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--first", action="store_true", help="one configuration of one kernel")
    args = parser.parse_args()
    for name, options in CASES[: 1 if args.first else None]:
        configs = getattr(kernels, name).configs[: 1 if args.first else None]
        for config in configs:
            kernel = compiled(name, options, config, args.dtype, args.capability)
            case = {"kernel": f"{name} {options}", "config": str(config), "multiplies": True}
            print(json.dumps({**case, **facts(kernel)}), flush=True)
    for name, options in [] if args.first else OTHERS:
        config = triton.Config({}, num_warps=8 if name == "schedule" else 4)
        kernel = compiled(name, options, config, args.dtype, args.capability)
        case = {"kernel": f"{name} {options}", "config": str(config), "multiplies": False}
        print(json.dumps({**case, **facts(kernel)}), flush=True)
    for function, types, constants in FURTHER if args.dtype == "bf16" and not args.first else []:
        kernel = compiled_further(function, types, constants, args.capability)
        case = {"kernel": function.__name__, "config": str(constants), "multiplies": False}
        print(json.dumps({**case, **facts(kernel)}), flush=True)
