"""The forward kernels, compiled for GPUs that may be absent: they fit, keep to registers and use the tensor cores."""

import pytest
import torch

pytest.importorskip("triton")

from tests.compiling import SHARED, compiled

SHARED = SHARED | {80: 99 * 1024}  # of consumers' GPUs of that family; the A100 has more


def launch(arch, dtype, d, kind, dv=None, is_causal=False, mask=False, dense=False, given="qkv", n=1024, precise=False):
    """What a ``kind`` launches (``forward``, ``tangent``, ``forward_with_tangent``), where nothing is interpreted."""
    from genkit.attention import _triton_forward
    from genkit.attention.inputs import Options

    kept = dict(dtype=getattr(torch, dtype), device="meta")
    q, k, v = (torch.empty(2, n, 16, channels, **kept).transpose(1, 2) for channels in (d, d, dv or d))
    moves = kind != "forward"
    tq, tk, tv = (x if moves and name in given else None for name, x in (("q", q), ("k", k), ("v", v)))
    lse = torch.empty(2, 16, n, device="meta") if kind == "tangent" else None
    keys = torch.empty(2, 1, 1, n, dtype=torch.bool, device="meta") if mask else None
    bias = torch.empty(1, 16, n, n, **kept) if dense else None
    rest = (tq, tk, tv, None, Options(d**-0.5, is_causal), moves, precise, None)
    each, tile, _ = _triton_forward.launches(q, k, v, bias, keys, lse, *rest, SHARED[arch])
    return _triton_forward._attend, each[0], tile.options()


def case(arch, d, kind, dtype="bfloat16", **more):
    return {"arch": arch, "dtype": dtype, "d": d, "kind": kind, **more}


def check(results, spilled):
    for x in results:
        print(x)
    for x in results:
        assert x["shared"] <= SHARED[x["arch"]] and x["spilled"] <= spilled and not x["serialised"], x
        assert x["wgmma" if x["arch"] == 90 and x["rows"] >= 64 else "mma"], x


def test_usual_sizes_keep_to_registers():
    cases = [
        case(90, 64, "forward_with_tangent"),
        case(90, 64, "tangent", n=1000),
        case(80, 64, "forward_with_tangent"),
    ]
    check(compiled("tests.attention.test_triton_compiles", cases), spilled=0)


def test_absent_tangents_cost_no_dots():
    cases = [case(90, 64, "forward_with_tangent", given=given) for given in ("qkv", "q")]
    cases += [case(90, 64, "tangent", given=given) for given in ("qv", "v")]
    found = compiled("tests.attention.test_triton_compiles", cases)
    assert len({(x["rows"], x["keys"]) for x in found}) == 1
    assert [6 * x["wgmma"] / found[0]["wgmma"] for x in found] == [6, 4, 5, 2]


def test_masks_and_biases_compile():
    """Of keys and of every entry: versions of Triton differ in what they compare with None."""
    for x in compiled("tests.attention.test_triton_compiles", [case(90, 64, "tangent", mask=True, dense=True)]):
        assert x["wgmma"] and x["shared"] <= SHARED[90], x


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_other_sizes_spill_little(arch):
    kinds = ("forward", "tangent", "forward_with_tangent")
    cases = [case(arch, d, kind) for d in (64, 72, 96, 128, 160, 256) for kind in kinds]
    cases += [case(arch, 64, kind, "float16") for kind in kinds]
    cases += [case(arch, d, "forward_with_tangent", is_causal=True, mask=True, n=1000) for d in (64, 128)]
    cases += [case(arch, 64, "forward_with_tangent", dv=72, precise=True), case(arch, 64, "forward", "float32")]
    check(compiled("tests.attention.test_triton_compiles", cases, timeout=1200), spilled=512)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_a_bias_of_every_entry_spills_little(arch):
    cases = [case(arch, d, kind, dense=True) for d in (64, 128, 256) for kind in ("forward", "forward_with_tangent")]
    for x in compiled("tests.attention.test_triton_compiles", cases, timeout=1200):
        print(x)  # on Hopper its dots wait for each other, since its entries are not loaded ahead
        assert x["shared"] <= SHARED[arch] and x["spilled"] <= 512


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_wide_heads_in_float32_fit(arch):
    cases = [case(arch, d, kind, "float32") for d in (64, 80, 128, 256) for kind in ("forward", "forward_with_tangent")]
    for x in compiled("tests.attention.test_triton_compiles", cases, timeout=1200):
        print(x)
        assert x["shared"] <= SHARED[arch]
