"""What Triton makes of the kernels for GPUs: its compiler needs none."""

import collections
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="there is no Triton for this platform")

SHARED_MEMORY = {80: 166912, 90: 232448}  # bytes that a program can have


def check(tmp_path, capability, dtype, *options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.experts.compile_kernels"),
            *(str(capability), dtype, *options),
        ],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    spilled = collections.defaultdict(list)  # bytes a thread, in each configuration of a launch
    for kernel in found:
        spilled[kernel["kernel"]].append(kernel["stack"] or kernel["spills"])
    smaller = "--smaller" in options
    if dtype == "fp32" or smaller:  # in some configuration of each launch none, or next to none
        most = 24 if dtype == "fp32" and smaller else 0
        assert all(min(sizes) <= most for sizes in spilled.values()), spilled
    else:
        assert not any(map(any, spilled.values())), spilled
    for kernel in found:
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        if kernel["multiplies"]:
            assert kernel["asynchronous_loads"], kernel
            assert kernel["matrix_instructions"] or "'ieee'" in kernel["kernel"], kernel
    return found


@pytest.mark.distributed  # starts a process
def test_kernels_for_hopper_have_tensor_core_instructions_and_no_spills(tmp_path):
    assert len(check(tmp_path, 90, "bf16", "--first")) == 10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_has_tensor_core_instructions_and_fits(tmp_path, capability, dtype):
    assert len(check(tmp_path, capability, dtype)) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dtype", [(80, "fp32"), (90, "fp32"), (80, "bf16"), (90, "fp16")]
)
def test_tiles_of_fewer_rows_and_products_in_fp32(tmp_path, capability, dtype):
    found = check(tmp_path, capability, dtype, "--smaller")
    assert len({kernel["kernel"] for kernel in found}) == 7 * (4 if dtype == "fp32" else 2)
