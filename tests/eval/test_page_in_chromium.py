"""The comparison page as a browser has it: no errors, no requests, tables that sort, images that show, any screen."""

import itertools
import os
from pathlib import Path

import pytest
import torch

from genkit.eval.page import main
from genkit.eval.report import Cell, Column, Section, Table, write_report
from genkit.eval.run import evaluate
from tests.eval.chromium import FOUND, NAMES, Chromium
from tests.eval.sweeps import MMHM, make_sweep

pytestmark = [
    pytest.mark.skipif(FOUND is None, reason=f"none of {', '.join(NAMES)} is installed"),
    pytest.mark.filterwarnings("ignore:.*rank deficient"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_sweep(tmp_path_factory.mktemp("sweep"), steps=(1, 4), guidance=(1.0, 1.5, 3.0), intervals=3)
    path = folder / "page.html"
    return main([folder], path, mmhm=MMHM, quiet=True)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images that the page shrinks, whose runs have long names, metrics of long names, and no labels."""
    folder = tmp_path_factory.mktemp("photographs")
    g = torch.Generator().manual_seed(0)
    for name in ("a_model_with_a_name_that_is_so_long_that_nothing_is_wide_enough_for_it", "b"):
        x = torch.randint(0, 256, (12, 3, 8, 12), generator=g, dtype=torch.uint8)
        x = x.repeat_interleave(16, 2).repeat_interleave(16, 3)
        evaluate(
            x.flip(0), x, metrics=["psnr", "contrast", "saturation"], extractor="none", made_with={"model": name},
            output=folder / name, quiet=True,
        )  # fmt: skip
    return main([folder / "b", *folder.glob("a_*")], folder / "page.html", mmhm="psnr,contrast:min", quiet=True)


WIDTH = "[document.documentElement.scrollWidth, innerWidth]"


@pytest.mark.parametrize(
    "which, width, dark", [("page", 1280, False), ("page", 360, True), ("photographs", 360, False)]
)
def test_loads_whole(which, width, dark, browser, request):
    path = request.getfixturevalue(which)
    browser.open(path, width=width, dark=dark)
    assert browser.problems() == []
    images = browser.run("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert len(images) > 30 and all(complete and w > 0 and h > 0 for complete, w, h in images)
    assert browser.run("[...document.querySelectorAll('details')].map(d => d.open = true).length") > 0
    scroll, inner = browser.run(WIDTH)
    assert inner == width and scroll <= inner
    tiles = browser.run("[...document.querySelectorAll('.strips img')].map(i => i.getBoundingClientRect().width)")
    assert min(tiles) > 40
    drawings = browser.run(
        "[...document.querySelectorAll('.drawing svg')].map(s => [s.getBoundingClientRect().width, "
        "s.querySelectorAll('path').length, s.querySelectorAll('text').length, getComputedStyle(s).color])"
    )
    if which == "page":
        assert len(drawings) == 2 * 9 and all(w > 250 and paths > 3 and texts > 4 for w, paths, texts, _ in drawings)
        assert {ink for *_, ink in drawings} == {"rgb(233, 233, 236)" if dark else "rgb(28, 29, 33)"}
    # Every name that a drawing refers to is in it, once.
    ids = browser.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    uses = browser.run("[...document.querySelectorAll('use')].map(u => u.getAttribute('xlink:href').slice(1))")
    assert set(uses) <= set(ids)


def column(browser, table, head):
    return browser.run(
        f"(() => {{ const t = document.querySelectorAll('table.sorts')[{table}]; "
        f"const j = [...t.tHead.rows[0].cells].findIndex(c => c.textContent.trim().startsWith({head!r})); "
        "return [...t.tBodies[0].rows].map(r => [r.cells[0].firstChild.textContent, r.cells[j].dataset.number ?? null, "
        "r.cells[j].textContent]); })()"
    )


def click(browser, table, head):
    browser.run(
        f"[...document.querySelectorAll('table.sorts')[{table}].tHead.rows[0].cells]"
        f".find(c => c.textContent.trim().startsWith({head!r})).querySelector('button').click()"
    )


def test_tables_sort_both_ways(page, browser):
    browser.open(page)
    before = column(browser, 0, "MMHM")
    assert [float(n) for _, n, _ in before] == sorted((float(n) for _, n, _ in before), reverse=True)
    for head in ("frechet_distance@150", "steps", "recall"):
        click(browser, 0, head)
        up = column(browser, 0, head)
        assert [float(n) for _, n, _ in up] == sorted(float(n) for _, n, _ in up)
        click(browser, 0, head)
        down = column(browser, 0, head)
        assert [float(n) for _, n, _ in down] == sorted((float(n) for _, n, _ in down), reverse=True)
        assert sorted(map(str, up)) == sorted(map(str, down)) and up != down
        assert browser.run("document.querySelectorAll('table.sorts')[0].querySelectorAll('[aria-sort]').length") == 1
    click(browser, 0, "run")
    names = [name for name, *_ in column(browser, 0, "run")]
    want = browser.run(f"{names!r}.sort((a, b) => a.localeCompare(b, undefined, {{numeric: true}}))")
    assert names == want and names[0].startswith("student, ")


def test_what_is_no_number_sorts_last_and_infinity_is_one(tmp_path, browser):
    table = Table(["name", Column("x", "higher")], [["a", 2], ["b", None], ["c", float("inf")], ["d", Cell(-1.5, "n")]])
    browser.open(write_report(tmp_path / "t.html", "T", Section("S", [table])))
    orders = []
    for _ in range(2):
        click(browser, 0, "x")
        orders.append("".join(name for name, *_ in column(browser, 0, "x")))
    assert orders == ["dacb", "cadb"]


@pytest.mark.parametrize("which", ["page", "photographs"])
def test_prints(which, browser, request):
    browser.open(request.getfixturevalue(which))
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 20_000
    assert browser.run("[...document.querySelectorAll('details')].every(d => d.open)")
    # As wide as a page: nothing is cut off, since paper does not scroll.
    browser.open(request.getfixturevalue(which), width=720)
    browser.send("Emulation.setEmulatedMedia", media="print")
    scroll, inner = browser.run(WIDTH)
    browser.send("Emulation.setEmulatedMedia", media="")
    assert scroll <= inner == 720


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(dark, page, browser):
    """Contrast of at least 4.5 (WCAG 2 AA) between text and ground, wherever there is text."""
    browser.open(page, dark=dark)
    pairs = browser.run(
        """(() => {
          const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
          const rgba = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data]; };
          const found = new Set();
          for (const e of document.querySelectorAll('main *, header *, footer')) {
            if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.closest('svg')) continue;
            let ground = e;
            while (rgba(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
            const colors = [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor].map(rgba);
            found.add(JSON.stringify([e.tagName, ...colors]));
          }
          return [...found].map(JSON.parse);
        })()"""
    )
    assert len(pairs) > 15

    def luminance(color):
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for tag, ink, ground in pairs:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (tag, ink, ground)


@pytest.mark.skipif("GENKIT_SCREENSHOTS" not in os.environ, reason="set GENKIT_SCREENSHOTS to a folder to get them")
def test_screenshots(page, photographs, browser):
    folder = Path(os.environ["GENKIT_SCREENSHOTS"])
    for (name, path), width, dark in itertools.product(
        {"sweep": page, "photographs": photographs}.items(), (1280, 360), (False, True)
    ):
        browser.open(path, width=width, dark=dark)
        (folder / f"{name}-{width}-{'dark' if dark else 'light'}.png").write_bytes(browser.picture())
