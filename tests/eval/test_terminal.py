import io

import pytest
from rich.console import Console

from genkit.eval.terminal import print_rows

COLUMNS = {
    "rank": [1, 2, 3],
    "MMHM": [0.5, 0.5, 0.5],
    "model": ["tiny"] * 3,
    "scheduler": [None] * 3,
    "run": ["a [b]", "b", "c"],
} | {f"some_long_metric_{i}": [1 / 3 + i, 123456.789, None] for i in range(9)}


def printed(columns, width, **settings):
    file = io.StringIO()
    print_rows("title", columns, console=Console(file=file, width=width), **settings)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_everything_is_there_once_within_the_width(width):
    text = printed(COLUMNS, width, keep=["MMHM"])
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines) and "…" not in text
    assert lines[:2] == ["title", "the same in all rows: model tiny"] and "scheduler" not in text
    assert text.count("1.2346e+05") == 9 and "a [b]" in text and text.count("MMHM") == 1
    assert [text.count(f"{1 / 3 + i:.5g}") for i in range(9)] == [1] * 9
    parts = text.count("rank")
    assert parts == 1 if width == 200 else parts > 1


def test_one_row_has_nothing_in_common_with_others():
    text = printed({"rank": [1], "model": ["tiny"]}, 80)
    assert "the same" not in text and "tiny" in text
