"""The pipeline of an autoregressive network."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from genkit.networks.gpt import GPT
from genkit.pipelines.autoregressive import AutoregressivePipeline


@pytest.fixture
def pipe():
    network = GPT(vocab_size=5, sample_size=4, num_classes=3, hidden_size=16, num_layers=1, num_heads=2)
    nn.init.normal_(network.out.weight, std=0.5)
    return AutoregressivePipeline(network.eval())


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_pictures(pipe):
    out = pipe([0, 2], generator=seeds(1, 2), output_type="pt")
    assert out.images.shape == (2, 1, 4, 4) and out.network_calls == 16
    assert set((out.images * 4).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    alone = pipe(2, generator=seeds(2), output_type="pt").images
    assert torch.equal(alone[0], out.images[1])
    assert pipe(0, num_images_per_label=3).images[2].size == (4, 4)
    guided = pipe([0, 2], guidance_scale=3.0, generator=seeds(1, 2), output_type="latent", return_dict=False)
    assert guided[1] == 32 and guided[0].min() >= -1


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = AutoregressivePipeline.from_pretrained(tmp_path)
    images = [p([1], generator=seeds(7), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images) and isinstance(loaded, DiffusionPipeline)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(class_labels=[3]), "accepted are 0 to 2"),
        (dict(class_labels=[]), "at least one"),
        (dict(class_labels=0, num_images_per_label=0), "num_images_per_label=0"),
        (dict(class_labels=[0, 1], generator=seeds(1)), "generator has 1 entries for 2 images"),
        (dict(class_labels=0, output_type="png"), "output_type='png'"),
    ],
)
def test_bad_input(arguments, text, pipe):
    with pytest.raises(ValueError, match=text):
        pipe(**arguments)
