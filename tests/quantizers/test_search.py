import random
import subprocess
import sys
import time

import pytest
import torch

from genkit.quantizers import search
from genkit.quantizers.search import nearest_codes


def naive(z, codebook, measure="euclidean"):
    """Every pair, in float64."""
    z, codebook = z.double(), codebook.double()
    if measure == "cosine":
        codebook = torch.nn.functional.normalize(codebook, dim=1)
    found = []
    for rows in z.split(max(1, 2**22 // codebook.numel())):
        if measure == "euclidean":
            found.append((rows[:, None] - codebook).square().sum(2).argmin(1))
        else:
            found.append((rows[:, None] * codebook).sum(2).argmax(1))
    return torch.cat(found)


def exact(z, codebook, measure="euclidean", **settings):
    assert torch.equal(nearest_codes(z, codebook, measure=measure, **settings), naive(z, codebook, measure))


@pytest.fixture(params=["bfloat16", "float32", "float64"])
def begins_with(request, monkeypatch):
    """The search as it is on machines whose quickest product is of this precision, at any width."""
    order = [torch.bfloat16, torch.float32, torch.float64]
    monkeypatch.setattr(search, "_precisions", lambda z: order[order.index(getattr(torch, request.param)) :])


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dim", [1, 3, 8, 64, 256])
def test_the_same_as_comparing_all_in_float64(dim, measure, begins_with):
    z = torch.randn(60, dim)
    for k in (1, 2, 15, 17, 300, 1000):
        codebook = torch.randn(k, dim) * torch.rand(k, 1)
        for chunk_size in (1, 100, 2048):
            exact(z, codebook, measure, chunk_size=chunk_size)
        exact(codebook[:60] + 0.05 * z[:k], codebook, measure)


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
def test_the_lowest_index_of_a_tie(measure, begins_with):
    """Small whole numbers, and halves between them: many distances are equal without any rounding."""
    for dim in (1, 2, 8, 40):
        z = torch.randint(-2, 3, (200, dim)) / 2
        exact(z, torch.randint(-1, 2, (500, dim)).float(), measure)
    once = torch.randn(400, 8)
    exact(torch.randn(50, 8), once[torch.randint(400, (900,))], measure)
    exact(torch.zeros(3, 8), torch.cat((once, -once)), measure)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e-20])
def test_codes_that_are_all_the_same(value, begins_with):
    assert not nearest_codes(torch.randn(70, 40), torch.full((500, 40), value)).any()


def test_codes_that_are_nearly_the_same(begins_with):
    z = torch.randn(40, 48)
    for spread in (1e-2, 1e-5, 1e-7):
        exact(z, 1 + spread * torch.randn(700, 48))
        exact(z, spread * torch.randn(700, 48))
        exact(z, torch.randint(0, 2, (700, 1)) + spread * torch.randn(700, 48))
    after_a_step = torch.zeros(640, 48)
    after_a_step[::16] = 1e-3 * torch.randn(40, 48)
    exact(z, after_a_step)


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("dim", [8, 256])
def test_a_large_common_offset(offset, dim, begins_with):
    exact(torch.randn(50, dim) + offset, torch.randn(600, dim) + offset)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e18, 1e30])
def test_any_scale(scale, begins_with):
    z, codebook = torch.randn(50, 40), torch.randn(300, 40)
    for measure in ("euclidean", "dot"):
        exact(z * scale, codebook * scale, measure)
        exact(z, codebook * scale, measure)
    exact(torch.randn(50, 40) * scale, codebook * torch.logspace(-6, 6, 300)[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype, begins_with):
    z, codebook = torch.randn(80, 40, dtype=dtype), torch.randn(300, 40, dtype=dtype)
    for measure in ("euclidean", "cosine", "dot"):
        exact(z, codebook, measure)
        exact(z.float(), codebook, measure)
        exact(z, codebook.float(), measure)


def test_what_only_float64_tells_apart():
    z = torch.randn(20, 8, dtype=torch.float64)
    codebook = torch.randn(1, 8, dtype=torch.float64) + 1e-12 * torch.randn(300, 8, dtype=torch.float64)
    exact(z, codebook)
    assert len(nearest_codes(z, codebook).unique()) > 5


def test_what_the_process_chose_for_products_does_not_matter():
    z, codebook = torch.randn(200, 24), torch.randn(500, 24)
    chosen = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exact(z, codebook)
        assert before == (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    finally:
        torch.set_float32_matmul_precision(chosen)


def test_products_are_in_full_precision(monkeypatch):
    seen = set()
    mm = torch.mm

    def spy(*args, **kwargs):
        seen.add((torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    nearest_codes(torch.randn(5, 8), torch.randn(20, 8))
    assert seen == {("ieee", "ieee")}


def test_vectors_that_are_not_finite():
    z = torch.randn(5, 8)
    z[1, 2], z[3, 0] = torch.nan, -torch.inf
    codebook = torch.randn(40, 8)
    wanted = naive(z, codebook)
    wanted[[1, 3]] = 0
    assert torch.equal(nearest_codes(z, codebook), wanted)


def test_no_vectors_and_no_gradient():
    assert nearest_codes(torch.empty(0, 8), torch.randn(4, 8)).shape == (0,)
    found = nearest_codes(torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True))
    assert found.dtype == torch.int64 and not found.requires_grad


def test_nothing_is_drawn_or_changed():
    z, codebook = torch.randn(50, 40), torch.randn(300, 40)
    copies, states = (z.clone(), codebook.clone()), (torch.get_rng_state(), random.getstate())
    nearest_codes(z, codebook)
    assert torch.equal(z, copies[0]) and torch.equal(codebook, copies[1])
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_bad_input():
    z, codebook = torch.randn(3, 8), torch.randn(5, 8)
    for wrong in ((z, codebook[:, :7]), (z, codebook[:0]), (z[0], codebook), (z, codebook[None])):
        with pytest.raises(ValueError, match=r"expected \(N, D\) and \(K, D\), K >= 1"):
            nearest_codes(*wrong)
    with pytest.raises(ValueError, match="chunk_size=0: expected at least 1"):
        nearest_codes(z, codebook, chunk_size=0)
    with pytest.raises(ValueError, match="measure='manhatten' is not known"):
        nearest_codes(z, codebook, measure="manhatten")
    for measure in ("euclidean", "cosine", "dot"):
        for wrong in (torch.nan, torch.inf, -torch.inf):
            for k in (5, 3000):
                codebook = torch.randn(k, 8)
                codebook[k // 2 + 1, 3] = wrong
                with pytest.raises(ValueError, match="codebook: some values are not finite"):
                    nearest_codes(z, codebook, measure=measure)


def _seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def test_equal_codes_do_not_cost_more():
    """FVQ starts with one point, then moves one code in g: no code may be compared with all its likes."""
    z = torch.randn(512, 64)
    codebook = torch.randn(8192, 64)
    moved = torch.zeros(8192, 64)
    moved[::16] = 1e-3 * codebook[::16]
    nearest_codes(z, codebook)
    usual = min(_seconds(lambda: nearest_codes(z, codebook)) for _ in range(3))
    for equal in (torch.zeros(8192, 64), torch.full((8192, 64), 0.3), moved, 1e-6 * codebook):
        assert min(_seconds(lambda e=equal: nearest_codes(z, e)) for _ in range(3)) < 3 * usual + 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_memory():
    """A matrix of all pairs would take 268 MB."""
    script = """
import re, torch
torch.set_num_threads(1)
from genkit.quantizers.search import nearest_codes
z, codebook = torch.randn(1024, 8), torch.randn(65536, 8)
nearest_codes(z[:64], codebook[:4096])
def peak():  # which getrusage would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
nearest_codes(z, codebook)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 5 < int(done.stdout) / 1024 < 60
