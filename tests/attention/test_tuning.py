"""Measuring tiles, by a clock that is made up: there may be no GPU."""

import pytest

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from genkit.attention import _tuning
from genkit.attention._tiles import Tile

TILES = [Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)]


def test_the_fastest_tile_that_fits_is_measured_once():
    ran = []

    def run(tile):
        ran.append(tile)
        if tile is TILES[2]:
            raise OutOfResources(300, 227, "shared memory")
        return {TILES[0]: 3.0, TILES[1]: 2.0}[tile]

    for _ in range(2):
        assert _tuning.fastest("a kind", [*TILES, TILES[0]], run, measure=lambda f: f()) == TILES[1]
    assert ran == TILES
    assert _tuning.fastest("another", TILES[:1], run, measure=lambda f: f()) == TILES[0]


def test_tiles_that_never_fit_are_an_error():
    def run(tile):
        raise OutOfResources(300, 227, "shared memory")

    with pytest.raises(OutOfResources):
        _tuning.fastest("too large", TILES, run, measure=lambda f: f())


def test_nothing_is_measured_unasked_or_in_the_interpreter(monkeypatch):
    monkeypatch.delenv("GENKIT_TUNE", raising=False)
    assert not _tuning.wanted()
    monkeypatch.setenv("GENKIT_TUNE", "1")
    monkeypatch.setattr(_tuning, "interpreted", lambda: True)
    assert not _tuning.wanted()


def test_forward_takes_the_tile_that_was_fastest(monkeypatch):
    import torch

    from genkit.attention import _triton_forward
    from genkit.attention.inputs import Options

    asked = []

    def fastest(key, tiles, run):
        asked.append((key, run(TILES[1])))
        return TILES[1]

    monkeypatch.setattr(_tuning, "wanted", lambda: True)
    monkeypatch.setattr(_tuning, "fastest", fastest)
    q = torch.randn(1, 1, 20, 16)
    for n in (17, 30, 40):
        k = torch.randn(1, 1, n, 16)
        o, lse = _triton_forward.forward(q, k, k, None, None, Options(0.25, False))
        assert torch.equal(o, asked[-1][1][0])
    assert asked[0][0] == asked[1][0] != asked[2][0]  # lengths to the next power of two
