"""The digits in other styles."""

import pytest
import torch

from genkit import data
from genkit.data.styled_digits import plain, restyle


@pytest.mark.parametrize("style", ["plain", "inverted", "rotated"])
def test_a_style_can_be_undone(style):
    digits, styled = data.make("digits"), data.make("styled_digits", style=style)
    read, shown = digits.__getitems__(range(1797)), styled.__getitems__(range(1797))
    assert torch.equal(shown["class_labels"], read["class_labels"]) and len(styled) == 1797
    assert torch.equal(shown["x0"], restyle(read["x0"], style)) and torch.equal(plain(shown["x0"], style), read["x0"])
    assert torch.equal(shown["x0"], read["x0"]) == (style == "plain")


def test_the_styles():
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 0, 7] = 1  # upper right
    assert restyle(x, "rotated")[0, 0, 0, 0] == 1 and restyle(x, "inverted")[0, 0, 0, 7] == -1


def test_some_classes():
    source = data.make("styled_digits", style="inverted", classes=[7, 2])
    batch = source.__getitems__(range(len(source)))
    assert set(batch["class_labels"].tolist()) == {2, 7} and len(source) == 177 + 179
    assert source.num_classes == 10
    for classes in ([], [10]):
        with pytest.raises(ValueError, match="accepted are some of 0 to 9"):
            data.make("styled_digits", style="inverted", classes=classes)
    with pytest.raises(ValueError, match="Input should be 'plain', 'inverted' or 'rotated'"):
        data.make("styled_digits", style="bold")
