"""The transformer of masked autoregression and its diffusion head: sizes, what it sees, where it starts."""

import pytest
import torch
from torch import nn

from genkit.networks.mar import MAR

SMALL = dict(hidden_size=16, num_layers=2, num_heads=2, head_width=16, head_layers=2, buffer_size=3, dropout=0.0)
COUNTS = (
    "sample_size in_channels patch_size num_classes hidden_size num_layers num_heads head_width head_layers".split()
)
COUNTS += ["buffer_size"]
ORDER = torch.tensor([[5, 2, 9, 11, 0, 1, 3, 4, 6, 7, 8, 10, 12, 13, 14, 15], list(range(15, -1, -1))])
LABELS = torch.tensor([3, 10])


def small(**changes) -> MAR:
    torch.manual_seed(0)
    network = MAR(**SMALL | changes).double().eval()
    for weight in network.parameters():  # so that nothing is zero by its start
        nn.init.normal_(weight, std=0.2)
    return network


def tokens(seed=1) -> torch.Tensor:
    return torch.randn(2, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "hidden, layers, heads, width, head_layers, millions",
    [(768, 12, 12, 1024, 6, 208), (1024, 16, 16, 1280, 8, 479), (1280, 20, 16, 1536, 12, 943)],
    ids=["base", "large", "huge"],
)
def test_published_sizes(hidden, layers, heads, width, head_layers, millions):
    with torch.device("meta"):
        network = MAR(16, 16, 1, 1000, hidden, layers, heads, width, head_layers, 64)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.7)


@pytest.mark.parametrize("n", [0, 1, 7, 16])
def test_values_of_masked_tokens_do_not_matter(n):
    network, visible, x = small(), ORDER[:, :n], tokens()
    masked = torch.ones(2, 16, 1).scatter(1, visible[..., None], 0.0).bool()
    z = network(x, visible, LABELS)
    assert z.shape == (2, 16, 16)
    assert torch.equal(network(torch.where(masked, float("nan"), x), visible, LABELS), z)
    if n:
        changed = x.clone()
        changed[0, visible[0, 0]] += 1
        assert ((network(changed, visible, LABELS) - z).abs().amax(2) > 1e-6).tolist() == [[True] * 16, [False] * 16]


def test_the_order_of_known_tokens_does_not_matter():
    network, x = small(), tokens()
    a, b = (network(x, v, LABELS) for v in (ORDER[:, :6], ORDER[:, :6].flip(1)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_class_reaches_every_token():
    network, x = small(), tokens()
    other = network(x, ORDER[:, :6], torch.tensor([4, 10])) - network(x, ORDER[:, :6], LABELS)
    assert (other[0].abs().amax(1) > 1e-6).all() and not other[1].any()


def test_a_row_does_not_depend_on_its_neighbours():
    network, x = small(), tokens()
    torch.testing.assert_close(
        network(x[1:], ORDER[1:, :6], LABELS[1:]), network(x, ORDER[:, :6], LABELS)[1:], rtol=0, atol=1e-12
    )


def test_an_untrained_head_predicts_no_noise_and_the_middle_variance():
    network = MAR(**SMALL).eval()
    epsilon, logits = network.head(torch.randn(3, 16, 4), torch.tensor([0, 500, 999])[:, None], torch.randn(3, 16, 16))
    assert epsilon.shape == logits.shape == (3, 16, 4) and not epsilon.any() and not logits.any()


def test_the_head_sees_each_token_by_itself():
    head = small().head
    x, z, t = tokens(), torch.randn(2, 16, 16, dtype=torch.float64), torch.tensor(700)
    whole = torch.cat(head(x, t, z), dim=-1)
    torch.testing.assert_close(torch.cat(head(x[:, 3:4], t, z[:, 3:4]), dim=-1), whole[:, 3:4], rtol=0, atol=1e-12)
    several = torch.cat(head(x, torch.tensor([[700], [20]]), z), dim=-1)
    torch.testing.assert_close(several[0], whole[0], rtol=0, atol=1e-12)
    assert (several[1] - whole[1]).abs().amax() > 1e-3


def test_the_head_keeps_its_precision():
    network = MAR(**SMALL)
    x, z = torch.randn(2, 16, 4), torch.randn(2, 16, 16)
    nn.init.normal_(network.head.out.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network.head(x, torch.tensor(999), z)[0]
    assert inside.dtype == torch.float32 and torch.equal(inside, network.head(x, torch.tensor(999), z)[0])


def test_loaded_in_half_precision_the_head_is_in_float32(tmp_path):
    MAR(**SMALL).save_pretrained(tmp_path)
    network = MAR.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert network.embed.weight.dtype == torch.bfloat16 and network.head.embed.weight.dtype == torch.float32
    z = network(tokens().float(), ORDER[:, :6], LABELS)
    assert z.dtype == torch.bfloat16
    assert network.head(tokens().float(), torch.tensor(3), z)[0].dtype == torch.float32


def test_gradient_checkpointing_changes_nothing():
    network, grads = small().train(), []
    for on in (False, True):
        network.enable_gradient_checkpointing() if on else network.disable_gradient_checkpointing()
        network.zero_grad()
        network(tokens(), ORDER[:, :6], LABELS).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(patch_size=3), "sample_size=8 is not a multiple of patch_size=3"),
        (dict(hidden_size=18, num_heads=4), "hidden_size=18 is not a multiple of num_heads=4"),
        *((dict([(name, 0)]), f"{name}=0: must be at least 1") for name in COUNTS),
        (dict(num_layers=1.5), "num_layers=1.5: must be an integer"),
    ],
)
def test_settings_that_do_not_fit(settings, text):
    with pytest.raises(ValueError, match=text):
        MAR(**SMALL | settings)


@pytest.mark.parametrize("shape", [(2, 15, 4), (2, 16, 5)])
def test_tokens_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"tokens has shape .*, expected \(2, 16, 4\)"):
        small()(torch.zeros(shape, dtype=torch.float64), ORDER[:, :6], LABELS)
