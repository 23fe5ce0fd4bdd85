"""The kernels of gradients, compiled for GPUs that may be absent: they fit, keep to registers and use tensor cores."""

import pytest
import torch
from torch.torch_version import TorchVersion

pytest.importorskip("triton")

import triton

from tests.compiling import SHARED, compiled


def launch(arch, dtype, d, which, tangent=True, capacity=None, is_causal=False, mask=False, bias=None, n=1000):
    """The ``which``-th kernel after that of rows, as it is launched."""
    from genkit.attention import _triton_backward as kernels
    from genkit.attention._tiles import split
    from genkit.attention.inputs import Options

    kept = dict(dtype=getattr(torch, dtype), device="meta")
    x = torch.empty(2, n, 16, d, **kept).transpose(1, 2)
    row = torch.empty(2, 16, n, device="meta")
    o = x.float() if tangent else x
    moves = (x, x, x, None if bias is None else torch.empty(bias, **kept)) if tangent else (None,) * 4
    biased = None if bias is None else torch.empty(bias, **kept)
    seen = torch.empty(2, 1, 1, n, dtype=torch.bool, device="meta") if mask else None
    up = (o, o if tangent else None, row, row if tangent else None, x, x if tangent else None)
    tiles = kernels.choose(kept["dtype"], sum(split(d)), tangent, bias is not None, capacity or SHARED[arch])
    needs = (True, True, True, bias is not None, *(tangent,) * 3, bias is not None and tangent)
    plan, _ = kernels.launches(x, x, x, biased, seen, *moves, *up, Options(d**-0.5, is_causal), needs, tiles)
    launched = plan[1 + which]
    return launched.kernel, launched.arguments, launched.options


def check(cases, spilled, serialised=False):
    """``spilled``: bytes a thread that are written or read in the code, once each."""
    for x in compiled("tests.attention.test_triton_backward_compiles", cases, timeout=1200):
        print(x)
        assert x["shared"] <= SHARED[x["arch"]], x
        assert x["spilled"] <= spilled and x["serialised"] <= serialised, x
        assert x["wgmma" if x["arch"] == 90 and max(x["rows"], x["keys"]) >= 64 else "mma"], x


def case(arch, d, which, dtype="bfloat16", **more):
    return {"arch": arch, "dtype": dtype, "d": d, "which": which, **more}


def test_usual_sizes_keep_to_registers():
    """But for addresses, which are written once and read again: 112 bytes by Triton 3.6, 24 by 3.9."""
    old = TorchVersion(triton.__version__) < "3.7"
    check([case(90, 64, 0), case(90, 64, 1), case(90, 72, 2)], spilled=128 if old else 32)


def test_masks_and_biases_compile():
    check([case(90, 64, 2, mask=True, bias=[1, 16, 1000, 1])], spilled=2048, serialised=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_sums_keep_to_registers(arch):
    """What spills at 128 channels is addresses, which are written once and read again."""
    check([case(arch, d, i) for d, count in ((64, 2), (72, 3), (128, 3)) for i in range(count)], spilled=400)
    check([case(arch, d, i, tangent=False) for d in (64, 72, 128) for i in range(2)], spilled=400)
    check([case(arch, 64, i, "float16", is_causal=True, mask=True) for i in range(2)], spilled=400)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_other_sizes_fit(arch):
    check([case(arch, 256, i) for i in range(4)] + [case(arch, 256, i, tangent=False) for i in range(2)], spilled=1024)
    check([case(arch, 64, i, "float32") for i in range(2)], spilled=1024)
    biased = [case(arch, d, i, bias=[1, 16, 1000, 1000]) for d, count in ((64, 3), (128, 4)) for i in range(count)]
    check(biased, spilled=2048, serialised=True)  # on Hopper dots wait: a bias is not loaded ahead


@pytest.mark.slow
def test_tiles_fit_consumers_gpus():
    cases = [case(80, d, i, capacity=99 * 1024) for d, count in ((64, 2), (128, 3), (256, 4)) for i in range(count)]
    for x in compiled("tests.attention.test_triton_backward_compiles", cases, timeout=1200):
        print(x)
        assert x["mma"] and x["spilled"] <= 400 and x["shared"] <= x["capacity"]


@pytest.mark.slow
def test_what_wide_heads_in_float32_need_fits_where_they_are_fused():
    from genkit.attention.functional import _WIDE

    cases = [case(80, d, i, "float32", capacity=99 * 1024) for d in (160, 256) for i in (0, 3)]
    for x in compiled("tests.attention.test_triton_backward_compiles", cases, timeout=1200):
        print(x)
        assert x["shared"] <= (99 * 1024 if x["d"] <= 160 else _WIDE)
