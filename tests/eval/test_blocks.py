import base64
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from genkit.eval.blocks import (
    GRID,
    INK,
    Callout,
    Card,
    Cards,
    Commands,
    Details,
    Drawing,
    Drawings,
    Heatmap,
    Strip,
    Strips,
    short,
    tile,
)
from genkit.eval.plots import Panel, against
from genkit.eval.report import Cell, Code, Column, Section, Table, write_report


def picture(src):
    head, _, data = src.partition(",")
    return head, Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_tile_is_the_image_to_the_pixel(channels):
    x = torch.randint(0, 256, (channels, 9, 7), dtype=torch.uint8)
    head, found = picture(tile(x))
    assert head == "data:image/png;base64"
    assert (np.atleast_3d(np.array(found)).transpose(2, 0, 1) == x.numpy()).all()


def test_a_large_tile_is_shrunk_in_its_proportions():
    x = torch.full((3, 512, 256), 200, dtype=torch.uint8)
    x[:, 256:] = 30
    head, found = picture(tile(x))
    assert head == "data:image/webp;base64" and found.size == (64, 128)
    pixels = np.array(found.convert("RGB")).astype(int)
    assert abs(pixels[:60] - 200).max() < 4 and abs(pixels[68:] - 30).max() < 4
    assert picture(tile(torch.zeros(1, 1, 4000, dtype=torch.uint8)))[1].size == (128, 1)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 4, dtype=torch.uint8)])
def test_other_tiles_are_refused(bad):
    with pytest.raises(ValueError, match=r"uint8 \(1 or 3, H, W\)"):
        tile(bad)


def test_strips_fold_what_is_beyond():
    rows = [Strip(str(i), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)) for i in range(5)]
    assert [len(part) for part in Strips(rows, folded_after=3).parts] == [3, 2]
    assert [len(part) for part in Strips(rows).parts] == [5]
    assert rows[0].pixelated and not Strip("x", torch.zeros(1, 1, 64, 64, dtype=torch.uint8)).pixelated
    with pytest.raises(ValueError, match="shorter"):
        _ = Strip("x", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["one"]).tiles


def test_drawings_take_the_colours_of_the_page_and_keep_their_names_apart():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], "o-", clip_on=True)
    axes.set_xlabel("x", color=INK)
    axes.grid(color=GRID)
    a, b = (Drawing(figure, "t", k).svg for k in (0, 1))
    assert "currentColor" in a and "var(--line)" in a and INK not in a and GRID not in a
    assert "<metadata" not in a and "<style" not in a and "<?xml" not in a and a.startswith("<svg viewBox=")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (a, b)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', a)) <= ids[0]
    assert a == Drawing(figure, "t", 0).svg


def test_every_block_is_drawn_and_escaped(tmp_path):
    bad = "<b>x</b>"
    figure = Figure()
    figure.subplots().set_title(bad)
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    blocks = [
        Callout(bad, bad),
        Cards([Card(bad, bad, bad, main=True)]),
        Details(bad, [Table([bad], [[Cell(bad, bad)]])]),
        Commands([(bad, Code(bad))]),
        Heatmap([bad, "b"], [[1, -0.5], [-0.5, 1]], bad),
        Drawings([Drawing(figure, bad, 0)], [("#123", bad), ("#456", bad)], bad),
        Strips([Strip(bad, images, [bad])], [bad], bad, bad),
    ]
    html = write_report(tmp_path / "r.html", "t", Section("s", blocks)).read_text("utf-8")
    assert bad not in html and html.count("&lt;b&gt;x") >= 21
    assert 'class="neg" style="--share: 30%">−0.50</td>' in html and "+1.00</td>" in html


def test_cells_with_a_remark_sort_and_win_by_their_value(tmp_path):
    table = Table(["n", Column("x", "lower")], [["a", Cell(2.5, "2 – 3")], ["b", 1.5], ["c", Cell(None, "none")]])
    assert [row[1]["best"] for row in table.cells] == [False, True, False]
    html = write_report(tmp_path / "r.html", "t", Section("s", [table])).read_text("utf-8")
    assert '<td data-number="2.5">2.50<small>2 – 3</small></td>' in html and "<td>–<small>none</small></td>" in html


def test_numbers_for_people():
    assert [short(v) for v in (float("inf"), float("-inf"), 0.12345)] == ["∞", "−∞", "0.123"]


def lines(drawings, k=0):
    return drawings.items[k].figure.axes[0].lines


def test_panels_leave_out_what_is_not_there():
    values = [1.0, None, 4.0, float("inf"), 2.0, 3.0]
    x = [1, 2, 4, 8, "all", None]
    made = against("steps", x, ["m"] * 6, [Panel("a", values, "higher"), Panel("b", [None] * 6, "lower")], "", 0)
    assert [d.title for d in made.items] == ["a ↑"]
    assert [list(line.get_xdata()) for line in lines(made)] == [[1, 4]]
    assert against("steps", [4, 4], ["m"] * 2, [Panel("a", [1, 2], "lower")], "", 0) is None


@pytest.mark.parametrize("better, best", [("lower", [1, 2]), ("higher", [5, 6])])
def test_a_line_passes_through_the_best_of_each_place(better, best):
    panel = Panel("a", [5.0, 1.0, 2.0, 6.0], better, [None, (0.5, 1.5), None, (5, 7)])
    made = against("steps", [1, 1, 4, 4], ["m"] * 4, [panel], "", 0)
    dots, line, bar = lines(made)
    assert sorted(dots.get_ydata()) == [1, 2, 5, 6] and dots.get_linestyle() == "None"
    assert list(line.get_ydata()) == best
    assert list(bar.get_ydata()) == ([0.5, 1.5] if better == "lower" else [5, 7])


def test_distances_that_differ_by_much_are_on_a_logarithmic_axis():
    panels = [Panel("a", [1.0, 100.0], "lower"), Panel("b", [1.0, 100.0], "higher"), Panel("c", [0.0, 9.0], "lower")]
    made = against("steps", [1, 64], ["m", "m"], panels, "", 3)
    assert [d.figure.axes[0].get_yscale() for d in made.items] == ["log", "linear", "linear"]
    assert made.items[0].figure.axes[0].get_xscale() == "log" and [d.number for d in made.items] == [3, 4, 5]
