import pytest
import torch

from genkit.quantizers import make


def residual(**settings):
    return make("residual", dim=6, depth=3, quantizer=dict(kind="vq", codebook_size=32, init="normal"), **settings)


def test_each_codes_what_the_ones_before_left():
    quantizer = residual().eval()
    z = torch.randn(1, 20, 6)
    found, rest = quantizer(z), z
    for depth in range(3):
        own = quantizer.part(depth)(rest)
        assert torch.equal(found.indices[..., depth], own.indices)
        rest = rest - own.z_q
    torch.testing.assert_close(found.z_q, z - rest)
    books = [quantizer.part(d).codebook() for d in range(3)]
    assert not torch.equal(books[0], books[1])
    shared = residual(shared=True)
    assert shared.part(0) is shared.part(2) and len(list(shared.parameters())) == 1


def test_deeper_is_nearer():
    settings = dict(dim=4, quantizer=dict(codebook_size=64, rule="ema", kmeans_init=True))
    z = torch.randn(1, 500, 4)
    errors = []
    for depth in (1, 2, 4):
        quantizer = make("residual", depth=depth, **settings)
        quantizer(z)
        errors.append((quantizer.eval()(z).z_q - z).square().mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] / 4


def test_losses_are_means_over_depths_and_one_estimator_decides_the_gradient():
    quantizer = residual(estimator="rotation").double()
    z = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    found = quantizer(z)
    rest, losses = z, []
    for depth in range(3):
        q = quantizer.part(depth).codebook()[found.indices[..., depth]]
        losses.append(0.25 * (rest - q).square().mean())
        rest = rest - q
    torch.testing.assert_close(found.losses["commitment"], sum(losses) / 3)
    upstream = torch.randn(1, 20, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found.z_q * upstream).sum(), z)
    ratio = found.z_q.norm(dim=-1) / z.norm(dim=-1)
    torch.testing.assert_close(gradient.norm(dim=-1), upstream.norm(dim=-1) * ratio)


def test_groups_are_coded_by_themselves():
    quantizer = make("grouped", dim=6, groups=3, quantizer=dict(kind="vq", codebook_size=16, init="normal")).eval()
    z = torch.randn(1, 20, 6)
    found = quantizer(z)
    for group, part in enumerate(quantizer.parts):
        own = part(z[..., 2 * group : 2 * group + 2])
        assert torch.equal(found.indices[..., group], own.indices)
        assert torch.equal(found.z_q[..., 2 * group : 2 * group + 2], own.z_q)


def test_progress_reaches_the_parts():
    quantizer = make("grouped", dim=6, groups=2, quantizer=dict(kind="lfq", estimator="reste", entropy_weight=0.0))
    quantizer.progress = 0.7
    quantizer(torch.randn(1, 3, 6))
    assert [part.progress for part in quantizer.parts] == [0.7, 0.7]


def test_bad_settings():
    table = dict(codebook_size=8)
    for kind, wrong, message in (
        ("residual", dict(depth=0, quantizer=table), "depth=0"),
        ("residual", dict(depth=2, quantizer=table | {"estimator": "ste"}), "set its own estimator instead"),
        ("residual", dict(depth=2, quantizer=table | {"kind": "ibq"}), "kind='ibq' learns by the gradient of its own"),
        ("residual", dict(depth=2, quantizer=table | {"dim": 4}), "quantizer.dim is that of the residual one"),
        ("residual", dict(depth=2, quantizer=dict(codebook_size=0)), "quantizer 'vq': codebook_size=0"),
        ("residual", dict(depth=2, quantizer=table | {"kind": "qv"}), "quantizer='qv' is not known"),
        ("residual", dict(depth=2, quantizer=dict(kind="grouped", groups=2, quantizer=table)), "several indices"),
        ("grouped", dict(groups=4, quantizer=table), "groups=4 does not divide dim=6"),
        ("grouped", dict(groups=2, quantizer=table | {"dim": 3}), "quantizer.dim is dim / groups"),
    ):
        with pytest.raises(ValueError, match=message):
            make(kind, dim=6, **wrong)
