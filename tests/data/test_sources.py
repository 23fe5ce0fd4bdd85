import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from genkit import data
from genkit.data.base import collate
from genkit.rng import ItemRNG
from genkit.testing.distances import sliced_wasserstein
from genkit.testing.oracles import eight_gaussians

ENDLESS = ["checkerboard", "eight_gaussians", "synthetic", "two_moons"]


def settings(name):
    return dict(shape=(4, 8, 8), num_classes=3) if name == "synthetic" else {}


def test_found_by_file_name():
    assert {*ENDLESS, "digits", "hub_dataset", "image_folder", "pairs", "transfer"} <= set(data.names())
    assert data.names() == sorted(data.names())
    with pytest.raises(ValueError, match="source='digit' is not known; did you mean 'digits'"):
        data.make("digit")


@pytest.mark.parametrize("name", data.names())
def test_unknown_setting(name):
    with pytest.raises(ValueError, match="colour"):
        data.make(name, colour="red")


@pytest.mark.parametrize("name", [*ENDLESS, "digits"])
def test_batches_have_the_declared_form(name):
    source = data.make(name, **settings(name))
    batch = source.__getitems__([5, 3, 11])
    assert batch["x0"].shape == (3, *source.shape) and batch["x0"].dtype == torch.float32
    assert batch["class_labels"].shape == (3,) and batch["class_labels"].dtype == torch.int64
    many = source.__getitems__(range(500))["class_labels"]
    assert set(many.tolist()) == set(range(source.num_classes))


@pytest.mark.parametrize("name", [*ENDLESS, "digits"])
def test_items_do_not_depend_on_their_neighbours(name):
    source = data.make(name, **settings(name))
    together = source.__getitems__([40, 7, 2**40])
    for row, item in enumerate([40, 7, 2**40]):
        for key, value in source.__getitems__([item]).items():
            assert torch.equal(value[0], together[key][row])


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_sources_follow_their_seed_and_share_no_stream(name):
    make = lambda seed: data.make(name, seed=seed, **settings(name)).__getitems__(range(100))["x0"]  # noqa: E731
    assert torch.equal(make(3), make(3))
    assert not torch.equal(make(3), make(4))
    # Training draws its noise from ItemRNG(seed, index) with the same numbers: the data must not be that noise.
    x0, noise = make(0).flatten(1), ItemRNG(0, range(100)).normal(make(0).shape[1:]).flatten(1)
    for column in range(2):
        correlation = torch.corrcoef(torch.stack((x0[:, column], noise[:, column])))[0, 1]
        assert correlation.abs() < 0.35


@pytest.mark.parametrize("name", [*ENDLESS, "digits"])
def test_pickles_for_workers(name):
    source = data.make(name, **settings(name))
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.__getitems__([3])["x0"], source.__getitems__([3])["x0"])


def test_works_in_a_plain_dataloader():
    source = data.make("digits")
    loader = DataLoader(source, batch_size=100, shuffle=True, collate_fn=collate)
    seen = [batch["class_labels"] for batch in loader]
    assert torch.equal(torch.cat(seen).bincount(), source.labels.bincount())


def test_digits():
    source = data.make("digits")
    assert len(source) == 1797 and source.shape == (1, 8, 8) and source.num_classes == 10
    batch = source.__getitems__(range(1797))
    assert batch["x0"].min() == -1 and batch["x0"].max() == 1
    assert torch.equal(source.__getitems__([1797 + 5])["x0"], batch["x0"][5:6])  # the second visit of record 5


def test_eight_gaussians_follow_their_oracle():
    batch, law = data.make("eight_gaussians").__getitems__(range(20_000)), eight_gaussians()
    drawn = law.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(batch["x0"], drawn) < 0.06
    for label in range(8):
        part = batch["x0"][batch["class_labels"] == label].double()
        assert (part.mean(0) - law.means[label]).abs().max() < 0.03
        assert (part.std(0) - 0.3).abs().max() < 0.02


def test_checkerboard_fills_its_squares_evenly():
    batch = data.make("checkerboard").__getitems__(range(20_000))
    x0, labels = batch["x0"], batch["class_labels"]
    cell = x0.floor().long()
    assert x0.abs().max() <= 2 and bool((cell.sum(1) % 2 == 0).all())
    counts = torch.bincount((cell[:, 1] + 2) * 4 + cell[:, 0] + 2, minlength=16)
    assert (counts > 0).sum() == 8 and (counts[counts > 0] - 2500).abs().max() < 250
    for label in range(8):
        assert len(cell[labels == label].unique(dim=0)) == 1
    inside = x0 - cell
    assert (inside.mean(0) - 0.5).abs().max() < 0.02 and (inside.std(0) - 12**-0.5).abs().max() < 0.01


def test_two_moons_are_half_circles():
    batch = data.make("two_moons", noise=0.0).__getitems__(range(5000))
    for label, (centre, side) in enumerate([((-1.0, -0.5), 1), ((1.0, 0.5), -1)]):
        arm = batch["x0"][batch["class_labels"] == label] - torch.tensor(centre)
        torch.testing.assert_close(arm.norm(dim=1), torch.full((len(arm),), 2.0))
        assert bool((side * arm[:, 1] > 0).all()) and arm[:, 0].mean().abs() < 0.1
    noisy = data.make("two_moons", noise=0.2).__getitems__(range(5000))
    assert (noisy["x0"] - batch["x0"]).std().item() == pytest.approx(0.2, rel=0.05)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        data.make("two_moons", noise=-1)


def test_synthetic_makes_what_is_declared():
    fields = {"embeds": {"shape": (7, 16)}, "tokens": {"shape": (5,), "high": 3}}
    source = data.make("synthetic", shape=(4, 2, 8, 8), prompts=True, fields=fields)
    batch = source.__getitems__(range(64))
    assert set(batch) == {"x0", "prompts", "embeds", "tokens"} and source.num_classes is None
    assert batch["x0"].shape == (64, 4, 2, 8, 8) and batch["x0"].abs().max() == 1
    assert batch["embeds"].shape == (64, 7, 16) and batch["embeds"].std().item() == pytest.approx(1, rel=0.05)
    assert set(batch["tokens"].flatten().tolist()) == {0, 1, 2} and batch["tokens"].dtype == torch.int64
    assert len(set(batch["prompts"])) == 64
    with pytest.raises(ValueError, match="fields='x0': that name is taken"):
        data.make("synthetic", fields={"x0": {}})
