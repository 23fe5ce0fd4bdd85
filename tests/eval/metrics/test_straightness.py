"""Straightness of a pipeline's flow as a metric."""

import diffusers
import pytest
import torch

from genkit.eval import flow
from genkit.eval.extractors.base import function_extractor
from genkit.eval.generated import generated_images
from genkit.eval.inputs import read_images
from genkit.eval.metrics.straightness import FlowStraightness
from genkit.eval.run import evaluate
from genkit.networks.dit import DiT
from genkit.networks.gpt import GPT
from genkit.pipelines import ClassConditionalPipeline
from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.rng import ItemRNG


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.fixture(scope="module")
def pipe(network):
    return ClassConditionalPipeline(network, diffusers.FlowMatchEulerDiscreteScheduler())


def never(images):
    raise AssertionError("measured")


NEVER = function_extractor(never, 64, "never")


def test_it_is_that_of_the_flow(pipe):
    images = generated_images(pipe, [3] * 20 + [5] * 20, num_inference_steps=2)
    found = evaluate(
        None, images, metrics=["straightness:num_samples=20,num_steps=4,seed=1"], quiet=True,
        extractor=function_extractor(lambda images: images.flatten(1).float(), 64, "pixels"),
    )  # fmt: skip
    condition = pipe.encode(class_labels=[3] * 10 + [5] * 10)
    expected = flow.straightness(pipe.denoiser(), ItemRNG(1, range(20)).normal((1, 8, 8)), condition, num_steps=4)
    assert found.values["straightness"] == pytest.approx(expected.total, rel=1e-5)
    assert found.values["relative_straightness"] == pytest.approx(expected.relative, rel=1e-5)
    assert found.values["transport_cost"] == pytest.approx(expected.transport_cost, rel=1e-5)
    assert found.protocol.metrics == {"straightness": {"num_samples": 20, "num_steps": 4, "seed": 1}}
    assert found.nfe == 2  # its own calls are none of the images'


def test_a_constant_velocity_is_straight(network):
    class Constant(DiT):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) * 0 + 1

    pipe = ClassConditionalPipeline(Constant(hidden_size=16, num_layers=1, num_heads=2, patch_size=4).eval(),
                                    diffusers.FlowMatchEulerDiscreteScheduler())  # fmt: skip
    images = generated_images(pipe, [1, 2, 3], num_inference_steps=1)
    values = FlowStraightness(num_samples=3)(None, _side(images))
    assert values["straightness"] < 1e-10 and values["transport_cost"] == pytest.approx(64)


def _side(images):
    from genkit.eval.metrics.base import FeatureSet
    from genkit.eval.statistics import FeatureStats

    return FeatureSet(FeatureStats(1), model=images.model)


def test_what_has_no_linear_flow_is_refused_before_images_are_made(network, pipe):
    vp = ClassConditionalPipeline(network, diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="straightness is that of the linear path: wrap it in .*OnPath"):
        evaluate(None, generated_images(vp, [1, 2]), metrics=["straightness"], extractor=NEVER, quiet=True)
    gpt = AutoregressivePipeline(GPT(hidden_size=16, num_layers=1, num_heads=2, sample_size=4).eval())
    with pytest.raises(ValueError, match="AutoregressivePipeline has no denoiser"):
        evaluate(None, generated_images(gpt, [1, 2]), metrics=["straightness"], extractor=NEVER, quiet=True)
    digits = read_images("digits")
    with pytest.raises(ValueError, match="'straightness' needs generated images that a model makes.*pipeline:FOLDER"):
        evaluate(None, digits, metrics=["straightness"], extractor=NEVER, quiet=True)
    for setting in ("num_samples", "num_steps"):
        with pytest.raises(ValueError, match=f"{setting}=0: must be at least 1"):
            FlowStraightness(**{setting: 0})
    assert "straightness" not in evaluate(
        "digits", generated_images(pipe, [1] * 130, num_inference_steps=1), quiet=True
    ).values  # fmt: skip
