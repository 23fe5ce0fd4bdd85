"""Published files of weights: which are read, which are refused, and heads folded into one layer."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from genkit.rewards._loading import folded, read_weights
from tests.rewards import published

STATE = {"a": torch.arange(3.0), "b": torch.eye(2)}


def test_the_three_places_and_the_two_forms(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "nested.pth")
    save_file(STATE, tmp_path / "w.safetensors")
    for source, name in (
        (tmp_path, "w.pt"),
        (tmp_path / "nested.pth", "unused"),
        (tmp_path / "w.safetensors", "unused"),
    ):
        torch.testing.assert_close(read_weights(str(source), name), STATE)


def test_a_hub_id_is_asked_for_the_file(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pt")

    def download(repo, name, revision):
        assert (repo, name, revision) == ("owner/repo", "w.pt", "abc")
        return tmp_path / "w.pt"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    torch.testing.assert_close(read_weights("owner/repo", "w.pt", "abc"), STATE)


class Unwanted:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a file was run')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [({"a": Unwanted()}, "more than tensors"), ([1, 2], "holds list"), ({"state_dict": {"a": 3}}, "state dict")],
)
def test_files_that_are_no_state_dict_are_refused(content, message, tmp_path):
    if isinstance(content, dict) and any(isinstance(v, Unwanted) for v in content.values()):
        (tmp_path / "w.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(str(tmp_path / "w.pt"), "w.pt")


@pytest.mark.parametrize("source", ["", "gone.pt"])
def test_a_file_that_is_not_there_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        read_weights(str(tmp_path / source), "w.pt")


def test_linear_layers_in_a_row_are_one():
    head, features = published.head(768), torch.nn.functional.normalize(torch.randn(50, 768), dim=1)
    weight, bias = folded(head.state_dict())
    assert weight.shape == (768,) and bias.shape == ()
    torch.testing.assert_close(features @ weight + bias, head(features), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "a head of"),
        ({"layers.0.weight": torch.eye(2)}, "a head of"),
        ({"layers.0.weight": torch.eye(2), "layers.0.bias": torch.zeros(2)}, "2 outputs"),
        (
            {
                "layers.0.weight": torch.eye(2),
                "layers.0.bias": torch.zeros(2),
                "layers.2.weight": torch.zeros(1, 3),
                "layers.2.bias": torch.zeros(1),
            },
            "layers.2 takes 3 values and is given 2",
        ),
    ],
)
def test_other_heads_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        folded(state)
