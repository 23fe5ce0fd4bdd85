import base64
import io
import re

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from genkit.eval.report import (
    Code,
    Column,
    Figure,
    Gallery,
    ImageGrid,
    Paragraph,
    ProtocolBlock,
    Section,
    Table,
    format_number,
    grid_png,
    write_report,
)

matplotlib.use("Agg")


def images(n=7, c=1):
    return torch.randint(0, 256, (n, c, 8, 8), dtype=torch.uint8)


@pytest.fixture
def page(tmp_path):
    def write(*blocks, title="Title", **more):
        return write_report(tmp_path / "sub" / "r.html", title, Section("One", blocks), **more).read_text("utf-8")

    return write


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_pixel_enlarged_without_smoothing(channels):
    x = images(7, channels)
    sheet = np.array(Image.open(io.BytesIO(grid_png(x, columns=3, scale=5))))
    assert sheet.shape == (3 * 44 - 4, 3 * 44 - 4, 4)
    for i in range(7):
        tile = sheet[i // 3 * 44 :, i % 3 * 44 :][:40, :40]
        want = x[i].permute(1, 2, 0).expand(8, 8, 3).numpy().repeat(5, 0).repeat(5, 1)
        assert (tile[..., :3] == want).all() and (tile[..., 3] == 255).all()
    assert (sheet[40:44, :, 3] == 0).all() and (sheet[-40:, 44:, 3] == 0).all()  # gaps and empty places


def test_grid_errors():
    with pytest.raises(ValueError, match="uint8"):
        grid_png(images().float(), 3)
    with pytest.raises(ValueError, match=r"\(0, 1, 8, 8\)"):
        grid_png(images(0), 3)
    with pytest.raises(ValueError, match="columns=0"):
        grid_png(images(), 0)


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (12.634, 3, "12.6"),
        (0.031249, 3, "0.0312"),
        (191.2, 3, "191"),
        (99441.2, 3, "99,441"),
        (1.0, 3, "1.00"),
        (0.0, 3, "0"),
        (-4.126, 3, "-4.13"),
        (1797, 3, "1,797"),
        (2.5e-7, 3, "2.50e-07"),
        (float("nan"), 3, "nan"),
        (float("inf"), 3, "inf"),
    ],
)
def test_format_number(value, digits, text):
    assert format_number(value, digits) == text


def test_nothing_is_fetched_and_everything_is_inlined(page):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([1, 2, 3])
    html = page(
        "words",
        Gallery([ImageGrid(images(), "a"), ImageGrid(images(3, 3), "b")]),
        Figure(figure, "vector"),
        Figure(figure, "raster", raster=True),
    )
    plt.close(figure)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 4 and all(s.startswith("data:image/") for s in sources)
    assert not re.search(r"@import|url\(|<link|<script[^>]+src", html)
    svg = base64.b64decode(next(s for s in sources if "svg" in s).split(",")[1]).decode()
    assert "<svg" in svg and "<path" in svg


def test_text_is_escaped(page):
    bad = '<script>alert("x")</script>'
    html = page(
        Paragraph(bad), Table([bad], [[bad]], bad), Code(bad), ImageGrid(images(), bad), ProtocolBlock({bad: bad}),
        title=bad, subtitle=bad,
    )  # fmt: skip
    assert bad not in html and html.count("&lt;script&gt;") >= 9 and html.count("<script>") == 1


def test_table_marks_the_best_of_each_column(page):
    table = Table(
        ["name", Column("FD", "lower"), Column("acc", "higher", 4), "n"],
        [["real", 0.1, 1.0, 5], ["a", 12.634, 0.98765, 5], ["b", 20.0, None, 5], ["c", 12.634, 0.5, 5]],
        aside=[0],
    )
    best = [[cell["best"] for cell in row] for row in table.cells]
    assert best == [[False] * 4, [False, True, True, False], [False] * 4, [False, True, False, False]]
    html = page(table)
    assert '<td class="best" data-number="12.634">12.6</td>' in html and ">0.9877<" in html
    assert '<tr class="aside"><td>real</td>' in html and "<td>–</td>" in html


def test_table_rows_must_fit():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table(["a", "b"], [[1, 2], [3]])


def test_protocol_in_words(page):
    html = page(ProtocolBlock({"n_real": 5, "versions": {"torch": "2", "numpy": "3"}, "metrics": ["a", "b"]}))
    assert "<dt>n real</dt><dd>5</dd>" in html and "<dd>torch 2, numpy 3</dd>" in html and "<dd>a, b</dd>" in html


def test_sections_are_linked(tmp_path):
    sections = [Section(f"Part {i}", ["text"]) for i in range(3)]
    html = write_report(tmp_path / "r.html", "T", *sections).read_text("utf-8")
    for i in range(3):
        assert f'href="#s{i + 1}">Part {i}<' in html and f'<section id="s{i + 1}">' in html
    with pytest.raises(ValueError, match="at least one section"):
        write_report(tmp_path / "r.html", "T")


def test_a_failed_report_leaves_the_previous_one_whole(tmp_path):
    path = write_report(tmp_path / "r.html", "T", Section("One", ["first"]))
    with pytest.raises(ValueError, match="uint8"):
        write_report(path, "T", Section("One", [ImageGrid(images().float())]))
    assert "first" in path.read_text("utf-8") and [p.name for p in tmp_path.iterdir()] == ["r.html"]
