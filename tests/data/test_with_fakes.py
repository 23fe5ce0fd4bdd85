"""Fakes beside real samples: same class or prompt, every fake in its turn, nothing that depends on the batch."""

import pytest
import torch
from safetensors.torch import save_file

from genkit import data


def shards(folder, **tensors):
    """Two shards of fakes whose value tells their number."""
    folder.mkdir(exist_ok=True)
    n = len(next(iter(tensors.values()))) if tensors else 20
    fake = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    for i, part in enumerate(torch.arange(n).chunk(2)):
        save_file({"fake": fake[part]} | {k: v[part] for k, v in tensors.items()}, folder / f"fakes-{i}.safetensors")
    return folder


def make(folder, real=None):
    return data.make("with_fakes", real=real or {"name": "digits"}, fakes=folder)


def test_a_fake_has_the_class_of_the_real_sample(tmp_path):
    labels = torch.arange(50) % 10
    source = make(shards(tmp_path / "fakes", class_labels=labels))
    assert source.shape == (1, 8, 8) and source.num_classes == 10 and len(source) == 1797
    batch = source.__getitems__(range(1797))
    chosen = batch["fake"][:, 0, 0, 0].long()
    assert torch.equal(labels[chosen], batch["class_labels"])
    counts = torch.bincount(chosen, minlength=50)
    assert counts.min() > 15 and counts.max() < 65  # 36 each; within 4.5 standard deviations
    assert torch.equal(batch["x0"], data.make("digits").__getitems__(range(1797))["x0"])


def test_items_do_not_depend_on_their_neighbours_and_differ_between_visits(tmp_path):
    source = make(shards(tmp_path / "fakes", class_labels=torch.arange(50) % 10))
    together = source.__getitems__([3, 900, 3 + 1797])
    assert torch.equal(source.__getitems__([900])["fake"][0], together["fake"][1])
    visits = source.__getitems__([3 + 1797 * k for k in range(40)])["fake"][:, 0, 0, 0]
    assert len(visits.unique()) == 5


def test_a_fake_has_the_prompt_of_the_real_sample(tmp_path):
    records = torch.tensor([4, 4, 0, 9, 9, 9])
    real = dict(name="synthetic", shape=(1, 8, 8), prompts=True)
    source = make(shards(tmp_path / "fakes", records=records), real)
    assert len(source) == 3
    batch = source.__getitems__(range(30))
    shown = [int(prompt.split()[-1]) for prompt in batch["prompts"]]
    assert shown[:3] == [0, 4, 9]
    assert records[batch["fake"][:, 0, 0, 0].long()].tolist() == shown


def test_without_condition_any_fake_will_do(tmp_path):
    source = make(shards(tmp_path / "fakes"), dict(name="synthetic", shape=(1, 8, 8)))
    assert len(source.__getitems__(range(400))["fake"][:, 0, 0, 0].unique()) == 20


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="holds no shards"):
        make(tmp_path)
    source = make(shards(tmp_path / "fakes", class_labels=torch.arange(20) % 9))
    with pytest.raises(ValueError, match="holds no fake of class 9"):
        source.__getitems__(range(20))
    with pytest.raises(ValueError, match="data.real.name='digit' is not known"):
        make(tmp_path / "fakes", {"name": "digit"})
