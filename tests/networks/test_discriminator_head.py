"""Discriminator heads: on features of UNets and transformers, a logit a place, nothing shared across the batch."""

import math

import pytest
import torch

from genkit.denoisers import from_pipeline
from genkit.networks.discriminator_head import DiscriminatorHead, looks_generated, looks_real
from genkit.networks.dit import DiT
from genkit.testing import tiny

SMALL = dict(hidden_size=16, norm_num_groups=4)
KINDS = {"sd15": "map", "sdxl": "map", "sd3": "tokens", "flux": "tokens", "dit": "tokens"}


def trained(head):
    """The head with a last layer that is not zero."""
    for branch in head.branches:
        torch.nn.init.normal_(branch[-1].weight)
    return head


@pytest.mark.parametrize("architecture", KINDS)
def test_reads_any_network_and_passes_gradients(architecture):
    pipe = tiny.pipeline(architecture)
    denoiser = from_pipeline(pipe)
    given = {"class_labels": [0, 1]} if architecture == "dit" else {"prompt": ["a", "b"]}
    condition = denoiser.encode(pipe, **given)
    channels = denoiser.module.config.in_channels // (4 if architecture == "flux" else 1)
    z = torch.randn(2, channels, 16, 16, requires_grad=True)
    head = DiscriminatorHead.for_network(denoiser.module, **SMALL)
    assert head.config.kind == KINDS[architecture]
    _, features = denoiser.features(z, torch.tensor([0.3, 0.8]), condition, head.config.at)
    assert (head(features) == 0).all()  # undecided before training
    logits = trained(head)(features)
    assert logits.ndim == 2 and len(logits) == 2 and logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(looks_real(logits).mean(), z)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "shape", "settings", "places"),
    [
        ("map", (3, 8, 8, 8), {}, 64),
        ("map", (3, 8, 8, 8), dict(stride=2), 4),
        ("map", (3, 8, 9, 5), dict(stride=2), 2),
        ("tokens", (3, 7, 8), {}, 7),
    ],
)
def test_a_logit_a_place_that_no_other_item_changes(kind, shape, settings, places):
    head = trained(DiscriminatorHead(["a", "b"], [8, 8], kind=kind, **SMALL, **settings)).double()
    features = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    logits = head(features)
    assert logits.shape == (3, 2 * places)
    for i in range(3):
        alone = head([f[i : i + 1] for f in features])
        torch.testing.assert_close(alone[0], logits[i], rtol=1e-12, atol=1e-12)


def test_the_losses_of_an_undecided_head_are_log_two():
    zero = torch.zeros(5, 3)
    assert looks_real(zero) == pytest.approx(torch.full((5,), math.log(2)))
    assert looks_generated(zero) == pytest.approx(torch.full((5,), math.log(2)))
    assert (looks_real(zero + 1) < math.log(2)).all() and (looks_generated(zero + 1) > math.log(2)).all()


def test_learns_to_tell_two_sets_apart():
    torch.manual_seed(0)
    head = DiscriminatorHead(["a"], [4], kind="tokens", **SMALL)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(100):
        real, made = torch.randn(32, 5, 4), torch.randn(32, 5, 4) * torch.tensor([1.0, 1, 1, 3])
        loss = (looks_real(head([real])) + looks_generated(head([made]))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * 2 * math.log(2)


def test_saves_and_loads(tmp_path):
    head = trained(DiscriminatorHead.for_network(DiT(hidden_size=16, num_heads=2), ["blocks.0", "blocks.3"], **SMALL))
    head.save_pretrained(tmp_path)
    again = DiscriminatorHead.from_pretrained(tmp_path)
    features = [torch.randn(2, 4, 16) for _ in range(2)]
    torch.testing.assert_close(again(features), head(features), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(at=[]), "one number for each module"),
        (dict(channels=[8, 8]), "one number for each module"),
        (dict(kind="maps"), "kind='maps' is not known; did you mean 'map'"),
        (dict(stride=3), "stride=3: accepted are 1 and 2"),
        (dict(kind="tokens", stride=2), "for kind='tokens' 1"),
        (dict(num_layers=0), "num_layers=0: accepted is 1 or more"),
        (dict(hidden_size=20), "hidden_size=20, norm_num_groups=32"),
        (dict(hidden_size=32), "hidden_size=32, norm_num_groups=32"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        DiscriminatorHead(**dict(at=["a"], channels=[8]) | settings)


def test_features_that_do_not_fit():
    head = DiscriminatorHead(["a"], [8], stride=2, **SMALL)
    with pytest.raises(ValueError, match=r"'a' has shape \(1, 5, 8\); kind='map' accepts"):
        head([torch.zeros(1, 5, 8)])
    with pytest.raises(ValueError, match=r"shape \(1, 8, 2, 9\)"):
        head([torch.zeros(1, 8, 2, 9)])
    with pytest.raises(ValueError, match="DiT has no sub-module 'mid_block'"):
        DiscriminatorHead.for_network(DiT(hidden_size=16, num_heads=2), ["mid_block"])
