"""What holds for every metric."""

import json
import random
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genkit import cite
from genkit.denoisers import Condition
from genkit.eval.inputs import Maker, read_images
from genkit.eval.metrics import base
from genkit.eval.metrics.base import FeatureSet, Metric, get_metric
from genkit.eval.metrics.frechet_infinity import FrechetInfinity
from genkit.eval.metrics.kid import KernelInceptionDistance
from genkit.eval.statistics import FeatureStats
from genkit.quantizers.usage import CodeUsage
from genkit.registry import members
from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian
from tests.test_perceptual import vgg

NAMES = sorted(members(base.PACKAGE, Metric))
pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")
OF_FEATURES = {"cmmd", "frechet", "frechet_infinity", "inception_score", "kid", "mind", "prdc", "realism"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(vgg(), path)
    return str(path)


@pytest.fixture
def make(weights):
    """Every metric by its name, with settings for sets of 40 where the default ones are for thousands."""
    made = {
        "kid": lambda: KernelInceptionDistance(subsets=3, subset_size=20),
        "frechet_infinity": lambda: FrechetInfinity(both=True, sizes=4),
        "dists": lambda: get_metric(f"dists:{weights}"),
        "ea_dists": lambda: get_metric(f"ea_dists:{weights}"),
        "lpips": lambda: get_metric(f"lpips:net=vgg,backbone={weights}"),
        "reward": lambda: get_metric("reward:jpeg"),
    }
    return lambda name: made[name]() if name in made else get_metric(name)


class Both(Maker):
    """What metrics of a model read: a flow, originals, codes."""

    def __init__(self, originals):
        self.originals, self.made_with = originals, {"model": "both"}

    def denoiser(self):
        return Gaussian(torch.ones(2), 0.5).denoiser()

    def check_codes(self):
        pass

    def count_codes(self):
        return CodeUsage(4).update(torch.tensor([0, 1, 1]))

    def start(self, count, seed):
        return ItemRNG(seed, range(count)).normal((2,)), Condition()


def side(seed, n=40, dim=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g)
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 4, (n,), generator=g)
    prompts, images = [f"a {i}" for i in range(n)], read_images(images)
    return FeatureSet(FeatureStats(dim).update(x), x, 3 * x[:, :4], labels, images, prompts, Both(images))


def test_papers_can_be_cited():
    cited = cite.methods()
    assert all(cited[name] for name in OF_FEATURES | {"dists", "ea_dists", "lpips"})


def test_settings_with_a_default_on_the_class_are_recorded():
    class Power(Metric):
        power = 2

        def __init__(self):
            self.power, self._cache = 3, object()

        def __call__(self, reference, generated):
            return {}

    assert Power().settings == {"power": 3}


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_twice_and_no_random_state_touched(name, make):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    values = [make(name)(side(0), side(1)) for _ in range(2)]
    assert values[0].keys() == values[1].keys() and values[0]
    assert [struct.pack("d", v) for v in values[0].values()] == [struct.pack("d", v) for v in values[1].values()]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_values_and_settings_can_be_written(name, make):
    metric = make(name)
    values = metric(side(0), side(1))
    assert json.loads(json.dumps(metric.settings)) == metric.settings
    assert all(type(value) is float for value in values.values())
    assert metric.name.partition(":")[0] == name


@pytest.mark.parametrize("name", NAMES)
def test_reads_no_more_than_it_says(name, make):
    metric = make(name)
    full = side(0), side(1)
    only = [
        FeatureSet(one.stats if "stats" in reads else None, **{f: getattr(one, f) for f in reads if f != "stats"})
        for one, reads in zip(full, (metric.reads_reference, metric.reads_generated), strict=True)
    ]
    assert metric(*only) == pytest.approx(metric(*full), rel=1e-9)
    if not metric.reads_reference:
        assert metric(None, full[1]) == metric(*full)


@pytest.mark.parametrize("name", sorted(OF_FEATURES | {"accuracy"}))
def test_a_row_that_is_not_finite_is_named(name, make):
    x, y = side(0, dim=50), side(1, dim=50)  # few rows: the Frechet distance looks at them, too
    y.features[7, 2] = y.logits[7, 2] = float("nan")
    with pytest.raises(ValueError, match="row 7 is not finite"):
        make(name)(x, y)


@pytest.mark.parametrize("name", sorted(OF_FEATURES - {"cmmd"}))  # which is defined for one row
def test_too_small_sets_are_told_how_many_are_needed(name, make):
    with pytest.raises(ValueError, match=r"at least \d+"):
        make(name)(side(0, 1), side(1, 1))


@pytest.mark.parametrize("name", sorted(OF_FEATURES))
def test_low_precision_features_are_summed_in_float64(name, make):
    sides = [side(seed) for seed in (0, 1)]
    for one in sides:
        one.features.copy_(one.features.bfloat16())
        one.logits.copy_(one.logits.bfloat16())
    stats = [FeatureStats(5).update(one.features) for one in sides]
    low, high = (
        [
            replace(one, stats=s, features=one.features.to(t), logits=one.logits.to(t))
            for one, s in zip(sides, stats, strict=True)
        ]
        for t in (torch.bfloat16, torch.float64)
    )
    assert make(name)(*low) == make(name)(*high)
