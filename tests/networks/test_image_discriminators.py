"""Discriminators of pictures: sizes, patches, starts, frozen features."""

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from genkit.networks.dino_discriminator import DinoDiscriminator
from genkit.networks.patch_discriminator import PatchDiscriminator

VIT = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, intermediate_size=32)
HEAD = dict(hidden_size=16, norm_num_groups=4)


def vit(kind="dinov2", **changes):
    torch.manual_seed(0)
    settings = VIT | changes
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(patch_size=14, **settings))
    return ViTModel(ViTConfig(patch_size=7, **settings))


def test_published_patch_discriminator():
    torch.manual_seed(0)
    network = PatchDiscriminator()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    kinds = [type(m).__name__ for m in network.layers]
    assert kinds.count("BatchNorm2d") == 3 and kinds[:2] == ["Conv2d", "LeakyReLU"] and kinds[-1] == "Conv2d"
    assert [m.stride[0] for m in network.layers if isinstance(m, nn.Conv2d)] == [2, 2, 2, 1, 1]
    weights = torch.cat([m.weight.flatten() for m in network.layers if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    scales = torch.cat([m.weight for m in network.layers if isinstance(m, nn.BatchNorm2d)])
    assert scales.mean().item() == pytest.approx(1, abs=0.005) and scales.std().item() == pytest.approx(0.02, rel=0.1)
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 30 * 30)


@pytest.mark.parametrize("layers, patch", [(0, 7), (1, 16), (2, 34), (3, 70)])
def test_what_a_logit_sees(layers, patch):
    network = PatchDiscriminator(1, 4, layers, "none")
    x = torch.rand(1, 1, 96, 96, requires_grad=True)
    logits = network.layers(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad[0, 0] != 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (patch, patch)
    least = network.smallest
    assert network(torch.zeros(2, 1, least, least)).shape == (2, 1)
    with pytest.raises(ValueError, match=f"takes {least} at least"):
        network(torch.zeros(2, 1, least, least - 1))


@pytest.mark.parametrize("norm, alone", [("batch", False), ("group", True), ("none", True)])
def test_whether_a_logit_depends_on_its_neighbours(norm, alone):
    torch.manual_seed(0)
    network, x = PatchDiscriminator(1, 4, 1, norm).double(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    together, apart = network(x), network(x[:2])
    assert torch.allclose(together[:2], apart, atol=1e-12) == alone


@pytest.mark.parametrize("kind", ["dinov2", "dino"])
def test_features_are_frozen(kind):
    network = DinoDiscriminator(vit(kind, hidden_dropout_prob=0.5), **HEAD)
    assert network.layers == [1, 2, 3, 4] and network.training and not network.vit.training
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("head.") for name in trained)
    x = torch.rand(2, 3, 20, 28, requires_grad=True)
    logits = network(x)
    tokens = 1 + (2 * 2 if kind == "dinov2" else 3 * 4)
    assert logits.shape == (2, 4 * tokens) and not logits.any()  # heads start at 0
    nn.init.normal_(network.head.branches[0][-1].weight)
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0 and network.vit.layernorm.weight.grad is None
    assert torch.equal(network(x), network(x))


def test_a_size_of_ones_choice(tmp_path):
    vit().save_pretrained(tmp_path)
    network = DinoDiscriminator.load(tmp_path, layers=[2], size=14, **HEAD)
    assert network(torch.rand(2, 1, 40, 8)).shape == (2, 2)
    nn.init.normal_(network.head.branches[0][-1].weight)
    grey = torch.rand(1, 1, 14, 14)
    assert torch.equal(network(grey), network(grey.expand(1, 3, 14, 14)))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: PatchDiscriminator(norm="layer"), "norm='layer' is not known"),
        (lambda: PatchDiscriminator(num_layers=-1), "num_layers=-1"),
        (lambda: DinoDiscriminator(vit(), layers=[5]), r"layers=\[5\]: accepted are 1 to 4"),
        (lambda: DinoDiscriminator(vit(), layers=[]), r"layers=\[\]"),
        (lambda: DinoDiscriminator(vit(), size=20), "size=20: accepted are multiples of the patch of 14"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
