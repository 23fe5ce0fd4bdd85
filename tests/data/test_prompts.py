"""Prompts and labels without samples."""

import pytest
import torch

from genkit import data


def test_prompts_in_order_and_again():
    source = data.make("prompts", prompts=["a cat", "a dog"])
    assert source.shape is None and len(source) == 2
    assert source.__getitems__([1, 0, 3]) == {"prompts": ["a dog", "a cat", "a dog"]}


def test_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert data.make("prompts", file=file).__getitems__([0, 1])["prompts"] == ["a cat", "a dog"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        data.make("prompts", file=file)
    with pytest.raises(FileNotFoundError, match="data.file='nowhere.txt' is not a file"):
        data.make("prompts", file="nowhere.txt")
    file.write_bytes("un été\n".encode("latin-1"))
    with pytest.raises(ValueError, match="prompts.txt' is not UTF-8"):
        data.make("prompts", file=file)
    file.write_bytes(b"\xef\xbb\xbfa cat\n")  # a byte order mark is no part of the first prompt
    assert data.make("prompts", file=file).__getitems__([0])["prompts"] == ["a cat"]


def test_labels():
    source = data.make("prompts", num_classes=3)
    assert torch.equal(source.__getitems__(range(4))["class_labels"], torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("settings", [{}, {"prompts": ["a"], "num_classes": 2}])
def test_exactly_one(settings):
    with pytest.raises(ValueError, match="exactly one of prompts, file and num_classes"):
        data.make("prompts", **settings)
