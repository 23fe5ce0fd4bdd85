import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genkit.quantizers import make
from genkit.quantizers.fvq import default_group_size, sincos


def step(quantizer, z):
    """One of Adam on the quantizer's own losses."""
    optimizer = torch.optim.Adam([p for p in quantizer.parameters() if p.requires_grad], lr=1e-3)
    found = quantizer(z)
    sum(found.losses.values()).backward()
    optimizer.step()
    return found


@pytest.mark.parametrize("bridge", ["vit", "dit"])
def test_all_codes_start_as_one_point_and_grow_from_the_first_of_each_group(bridge):
    quantizer = make("fvq", dim=16, codebook_size=576, group_size=4, bridge=bridge)
    assert not quantizer.codebook().any()
    found = step(quantizer, torch.randn(2, 300, 16))
    assert not found.indices.any() and found.stats["usage"] == pytest.approx(1 / 576)
    codes = quantizer.codebook().detach()
    moved = codes.any(1).nonzero().flatten()
    if bridge == "vit":
        assert len(moved) == 144 and len(codes.unique(dim=0)) == 145
    else:  # its last modulation is closed, but its positions tell groups apart
        assert len(moved) == 144
    assert torch.equal(moved, torch.arange(0, 576, 4))


@pytest.mark.parametrize("bridge", ["vit", "dit"])
def test_every_raw_code_has_a_gradient(bridge):
    quantizer = make("fvq", dim=16, codebook_size=512, group_size=4, start="spread", bridge=bridge)
    z = torch.randn(1, 30, 16)
    if bridge == "dit":  # which is closed at first: groups do not see each other
        step(quantizer, z)
        assert not quantizer.embedding.grad.any(1).all()
        step(quantizer, z)
        quantizer.zero_grad()
    sum(quantizer(z).losses.values()).backward()
    assert (quantizer.embedding.grad.abs().sum(1) > 0).all()


def test_groups_may_be_exchanged():
    quantizer = make("fvq", dim=16, codebook_size=64, group_size=4, start="spread").double()
    codes = quantizer.codebook().detach().view(16, 4, 16)
    order = torch.randperm(16)
    with torch.no_grad():
        quantizer.embedding.copy_(quantizer.embedding.view(16, 4, 16)[order].reshape(64, 16))
    torch.testing.assert_close(quantizer.codebook().view(16, 4, 16), codes[order], rtol=0, atol=1e-12)


def test_the_residual_start_is_the_raw_codebook():
    quantizer = make("fvq", dim=16, codebook_size=64, start="residual")
    assert torch.equal(quantizer.codebook(), quantizer.embedding)
    assert quantizer.embedding.std().item() == pytest.approx(0.25, rel=0.1)


def test_raw_codes_that_are_frozen_stay():
    quantizer = make("fvq", dim=16, codebook_size=64, start="spread", freeze=True)
    raw, before = quantizer.embedding.clone(), quantizer.codebook().detach().clone()
    step(quantizer, torch.randn(1, 30, 16))
    assert torch.equal(quantizer.embedding, raw) and not torch.equal(quantizer.codebook(), before)


def test_published_initial_weights():
    quantizer = make("fvq", dim=16, codebook_size=1024)
    raw = quantizer.embedding.detach()
    assert raw.abs().max() <= 1 / 1024 and raw.std().item() == pytest.approx(3**-0.5 / 1024, rel=0.05)
    assert not quantizer.recover.weight.any() and not any(
        p.any() for n, p in quantizer.named_parameters() if n.endswith("bias")
    )
    qkv = quantizer.blocks[0].qkv.weight
    assert qkv.shape == (48, 16) and qkv.abs().max() <= (6 / 64) ** 0.5
    assert quantizer.blocks[0].up.weight.shape == (32, 16) and len(quantizer.blocks) == 2


@pytest.mark.parametrize(
    ("k", "group", "millions", "gmac"), [(16384, 16, 3.15, 4.29), (65536, 64, 9.46, 10.7)], ids=["16k", "65k"]
)
def test_the_size_and_cost_of_the_published_bridge(k, group, millions, gmac):
    """At D = d' = 256: weights, raw codes apart, and multiplications of one step, whatever the batch."""
    quantizer = make("fvq", dim=256, codebook_size=k).to("meta")
    count = sum(p.numel() for n, p in quantizer.named_parameters() if n != "embedding")
    assert quantizer.group_size == group and round(count / 1e6, 2) == millions
    with FlopCounterMode(display=False) as counter:
        quantizer.table()
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.005)


@pytest.mark.parametrize(
    ("k", "group"),
    [
        (4, 4),
        (576, 4),
        (1024, 4),
        (4096, 4),
        (16384, 16),
        (65536, 64),
        (262144, 64),
        (1000, 4),
        (999, 3),
        (9 * 1024, 9),
    ],
)
def test_default_group_sizes(k, group):
    assert default_group_size(k) == group


def test_bake_keeps_the_codes_only():
    quantizer = make("fvq", dim=16, codebook_size=64, start="spread", beta=0.5)
    baked = quantizer.bake()
    assert [n for n, _ in baked.named_parameters()] == ["embedding"]
    assert torch.equal(baked.embedding, quantizer.codebook()) and baked.settings["kind"] == "vq"
    assert torch.equal(baked.bake().codebook(), quantizer.codebook())


def test_averaged_weights_are_baked_as_the_bridge_makes_codes_of_them():
    from genkit.training.ema import EMA

    quantizer = make("fvq", dim=16, codebook_size=64, start="spread")
    ema = EMA({n: p for n, p in quantizer.named_parameters() if p.requires_grad}, [0.5])
    for _ in range(3):
        step(quantizer, torch.randn(1, 30, 16))
        ema.update()
    now = quantizer.codebook().detach().clone()
    with ema.swapped():
        averaged = quantizer.bake()
        assert torch.equal(averaged.codebook(), quantizer.codebook())
    assert torch.equal(quantizer.codebook(), now) and not torch.equal(averaged.codebook(), now)


def test_positions_differ():
    assert len(sincos(144, 16).unique(dim=0)) == 144


def test_bad_settings():
    for wrong, message in (
        (dict(codebook_size=64, dim=6), "a width of 6 is not divisible by num_heads=4"),
        (dict(codebook_size=64, dim=6, width=6, num_heads=3, bridge="dit"), "needs a width divisible by 4"),
        (dict(codebook_size=8191, dim=8), "codebook_size=8191 has no divisor from 2 to 7"),
        (dict(codebook_size=100, dim=8, group_size=3), "group_size=3 does not divide codebook_size=100"),
        (dict(codebook_size=64, dim=8, start="random"), "start='random'"),
        (dict(codebook_size=64, dim=8, bridge="mlp"), "bridge='mlp'"),
        (dict(codebook_size=64, dim=8, depth=0), "depth=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make("fvq", **wrong)
    assert make("fvq", codebook_size=8191, dim=8, group_size=1).codebook().shape == (8191, 8)
