import os
import subprocess
import sys

import pytest
import torch

from evomoe_plugin.experts.gelu import gelu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_torchs(dtype):
    x = torch.randn(50, 7, dtype=dtype, requires_grad=True)
    y = gelu(x)
    wanted = torch.nn.functional.gelu(x.float() if dtype.itemsize == 2 else x).to(dtype)
    assert torch.allclose(y, wanted, atol=1e-6)
    grads = [torch.autograd.grad(out.float().pow(2).sum(), x)[0] for out in (y, wanted)]
    assert torch.allclose(*grads, atol=1e-5)


def test_gradcheck():
    assert torch.autograd.gradcheck(gelu, torch.randn(9, dtype=torch.float64, requires_grad=True))


def test_onednn_is_left_as_it_was():
    before = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    gelu(torch.randn(4, requires_grad=True)).sum().backward()
    assert torch._C._get_mkldnn_enabled() == before


def test_no_kernel_is_compiled_for_a_shape():
    script = ("import torch\nfrom evomoe_plugin.experts.gelu import gelu\n"
              "gelu(torch.randn(33, 8, requires_grad=True)).sum().backward()")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env={**os.environ, "ONEDNN_VERBOSE": "1"}, check=True)
    assert "eltwise" not in run.stdout
