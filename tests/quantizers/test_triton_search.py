"""The fused search: the same codes as the eager one, whatever it is given, and bounds that are bounds."""

import pytest
import torch

pytest.importorskip("triton")

from genkit import kernels
from genkit.quantizers import search
from genkit.quantizers._exact import Codes
from genkit.quantizers._triton_search import Tiles
from genkit.quantizers.search import nearest_codes
from tests.compiling import SHARED, compiled
from tests.needs import kernels_that_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels():
    kernels_that_run()


def randn(*shape, **options):
    return torch.randn(*shape, **options).to(DEVICE)


def both(z, codebook, measure="euclidean"):
    with kernels.choose("off"):
        eager = nearest_codes(z, codebook, measure=measure)
    with kernels.choose("on"):
        assert torch.equal(nearest_codes(z, codebook, measure=measure), eager)
    return eager


@pytest.fixture
def alone(monkeypatch):
    """No other search follows: how many vectors are not sure is in the list."""
    unsure = []
    whole = Tiles.search

    def spy(self, z):
        found = whole(self, z)
        unsure.append(int((found < 0).sum()))
        return found

    monkeypatch.setattr(Tiles, "search", spy)
    monkeypatch.setattr(search, "_precisions", lambda z: [])
    return unsure


@pytest.mark.parametrize("measure", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize(("dim", "n", "k"), [(3, 70, 200), (8, 1, 300), (40, 70, 65), (72, 3, 1), (300, 20, 130)])
def test_the_same_codes(dim, n, k, measure, alone):
    z, codebook = randn(n, dim), randn(k, dim) * (0.5 + torch.rand(k, 1).to(DEVICE))
    exact = codebook.double()
    exact = torch.nn.functional.normalize(exact, dim=1) if measure == "cosine" else exact
    if measure == "euclidean":
        wanted = (z.double()[:, None] - exact).square().sum(2).argmin(1)
    else:
        wanted = (z.double() @ exact.T).argmax(1)
    with kernels.choose("on"):
        assert torch.equal(nearest_codes(z, codebook, measure=measure), wanted)
    assert alone == [0]  # the kernel alone was sure of all


def test_ties_and_equal_codes():
    """Small whole numbers: many distances are equal without any rounding, and more than two codes are the nearest."""
    z = torch.randint(-2, 3, (70, 4)).to(DEVICE) / 2
    both(z, torch.randint(-1, 2, (130, 4)).float().to(DEVICE))
    both(z, torch.randint(-1, 2, (130, 4)).float().to(DEVICE), "dot")
    once = randn(100, 8)
    both(randn(20, 8), once[torch.randint(100, (180,))])
    both(randn(20, 8), torch.cat((once, once)), "cosine")
    assert not both(randn(5, 40), torch.full((130, 40), 3.7, device=DEVICE)).any()


def test_codes_that_are_nearly_the_same():
    z = randn(20, 40)
    for spread in (1e-2, 1e-4, 1e-7):
        both(z, 1 + spread * randn(130, 40))
    both(randn(20, 8), torch.randint(0, 2, (130, 1)).to(DEVICE) + 1e-6 * randn(130, 8))


@pytest.mark.parametrize("dim", [8, 40])
def test_a_large_common_offset(dim, alone):
    for offset in (10.0, 1e3):
        z, codebook = randn(20, dim) + offset, randn(130, dim) + offset
        wanted = (z.double()[:, None] - codebook.double()).square().sum(2).argmin(1)
        with kernels.choose("on"):
            assert torch.equal(nearest_codes(z, codebook), wanted)
    assert alone == [0, 0]


@pytest.mark.parametrize("scale", [1e-38, 1e-18, 1e-6, 1e12, 1e18, 1e30])
def test_any_scale(scale):
    z, codebook = randn(10, 8), randn(70, 8)
    for measure in ("euclidean", "dot"):
        both(z * scale, codebook * scale, measure)
        both(z, codebook * scale, measure)
    both(z * scale, codebook)
    both(z * scale, codebook * torch.logspace(-6, 6, 70)[:, None].to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    z, codebook = randn(20, 40, dtype=dtype), randn(70, 40, dtype=dtype)
    both(z, codebook)
    both(z.float(), codebook, "cosine")
    both(z, codebook.float(), "dot")
    both(randn(20, 8, dtype=torch.float64), 1 + 1e-12 * randn(70, 8, dtype=torch.float64))


def test_vectors_that_are_not_finite():
    z, codebook = randn(5, 8), randn(70, 8)
    z[1, 2], z[3, 0] = torch.nan, -torch.inf
    assert not both(z, codebook)[[1, 3]].any()
    for wrong in (torch.nan, torch.inf):
        codebook[41, 3] = wrong
        with kernels.choose("on"), pytest.raises(ValueError, match="codebook: some values are not finite"):
            nearest_codes(z, codebook)


def test_vectors_and_codes_that_are_no_blocks_in_memory():
    both(randn(8, 20).T, randn(8, 2, 70)[:, 1].T)
    both(randn(20, 16)[:, ::2], randn(140, 8)[::2])
    assert both(randn(0, 8), randn(70, 8)).shape == (0,)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("measure", ["euclidean", "dot"])
def test_no_code_comes_below_its_bound(digits, measure, monkeypatch):
    """Of every listed code, and of all that are not listed, in float64; and bounds are not far below."""
    seen = {}

    def spy(self, z, least, members, size, longest, most, unlisted):
        seen.update(self=self, least=least.clone(), members=members, unlisted=unlisted)
        return torch.zeros(len(z), dtype=torch.int64)

    monkeypatch.setattr(Codes, "decide", spy)
    n, k = 40, 200
    for dim, z_scale, scale in ((5, 1, 1), (40, 1e3, 1e-3), (100, 1e-9, 1e4)):
        z = z_scale * randn(n, dim)
        codebook = scale * randn(k, dim) * torch.logspace(-3, 0, k)[:, None].to(DEVICE)
        with kernels.choose("on"):
            Tiles.of(codebook, measure, digits).search(z)
        offset = seen["self"].offset.double()
        z, codebook = z.double() - offset, codebook.double() - offset
        exact = codebook.square().sum(1) * (measure == "euclidean") - 2 * z @ codebook.T
        groups = torch.arange(len(seen["least"]), device=DEVICE)
        unlisted = torch.ones(n, k, dtype=torch.bool, device=DEVICE)
        size = codebook.norm(dim=1).amax() * (z.norm(dim=1).amax() + codebook.norm(dim=1).amax())
        for row in range(n):
            codes = seen["members"](torch.full_like(groups, row), groups)[:, 0]
            above = exact[row, codes] - seen["least"][:, row].double()
            assert (above >= 0).all()
            assert above.max() < (2e-3 if digits == 1 else 6e-5) * size
            unlisted[row, codes] = False
        assert (exact.where(unlisted, torch.inf).amin(1) >= seen["unlisted"].double()).all()
        assert len(groups) == 8 and unlisted.sum(1).min() >= k - 8  # four tiles, of which each lists two codes


def test_vectors_of_which_two_codes_a_part_do_not_suffice_are_searched_again(alone):
    """Three codes in one tile that one digit does not tell apart and two do, and four that nothing does."""
    codebook = randn(70, 40)
    codebook[1:3] = codebook[0] + 2e-2 * randn(2, 40)
    codebook[11:14] = codebook[10]
    with kernels.choose("on"):
        found = nearest_codes(codebook[[0, 1, 2, 5, 10]], codebook)
    assert found[:4].tolist() == [0, 1, 2, 5]
    assert alone == [4, 1]


def launch(dim: int, digits: int, arch: int):
    """For :func:`compiled`."""
    from genkit.quantizers import _triton_search as it

    width = it.channels_of_a_tile(dim, digits)
    parts = -(-dim // width)
    floats = torch.empty(64, device="meta")
    arguments = dict.fromkeys(("square", "of_row", "of_tile", "least", "others"), floats)
    arguments |= {"z": floats.half(), "codes": floats.half(), "listed": floats.int(), "blocks": 3, "tiles": 5, "per": 7}
    arguments |= {"DIGITS": digits, "PARTS": parts, "CHANNELS": width, "ROWS": it.ROWS, "CODES": it.CODES}
    return it._lowest, arguments, it.options(parts)


def test_as_compiled_for_a_gpu():
    pytest.importorskip("triton.backends.nvidia")
    cases = [{"dim": d, "digits": 2 if d == 8 else 1, "arch": a} for d, a in ((8, 90), (256, 80), (256, 90), (768, 90))]
    for found in compiled("tests.quantizers.test_triton_search", cases):
        assert found["spilled"] == 0, found
        assert found["shared"] < SHARED[found["arch"]] // (2 if found["dim"] <= 256 else 1), found  # two blocks fit
        assert found["wgmma" if found["arch"] == 90 else "mma"], found
