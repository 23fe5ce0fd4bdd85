"""What every quantizer promises, with every option; a new file is tested by being there."""

import random
import subprocess
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.quantizers import Quantizer, make, names
from genkit.quantizers._codebook import CodebookConfig
from genkit.registry import members
from tests.quantizers.ready import CASES, IDS, SETTINGS, TABLE, made

every = pytest.mark.parametrize("case", CASES, ids=IDS)


def trained(quantizer: Quantizer, *shape: int, steps: int = 3) -> Quantizer:
    """After some steps of training on noise, so that nothing is as it was made."""
    weights = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=0.05) if weights else None
    for _ in range(steps):
        z = torch.randn(2, 40, quantizer.dim, requires_grad=True)
        found = quantizer(z)
        loss = found.z_q.square().sum() + sum(found.losses.values())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return quantizer.eval()


def test_settings_of_tests_are_of_quantizers_that_exist():
    assert set(SETTINGS) <= set(names()) and len(CASES) >= len(names())


@every
def test_shapes_losses_and_stats(case):
    quantizer = made(case)
    own = quantizer.indices_shape
    for shape, cells in (((2, quantizer.dim, 3, 5), (2, 3, 5)), ((2, 7, quantizer.dim), (2, 7))):
        z = torch.randn(shape, requires_grad=True)
        found = quantizer(z)
        assert found.z_q.shape == z.shape and found.z_q.dtype == z.dtype
        assert found.indices.shape == (*cells, *own) and found.indices.dtype == torch.int64
        assert 0 <= found.indices.min() and found.indices.max() < quantizer.codebook_size
        assert all(loss.shape == () and loss.isfinite() for loss in found.losses.values())
        assert set(found.stats) == {"usage", "perplexity"}
        assert 0 < found.stats["usage"] <= 1 and 1 <= found.stats["perplexity"] <= quantizer.codebook_size
        (gradient,) = torch.autograd.grad(found.z_q.square().sum() + sum(found.losses.values()), z)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@every
def test_both_layouts_agree(case):
    quantizer = trained(made(case))
    z = torch.randn(2, quantizer.dim, 3, 5)
    grid, rows = quantizer(z), quantizer(z.flatten(2).transpose(1, 2))
    assert torch.equal(grid.indices.flatten(1, 2), rows.indices)
    assert torch.equal(grid.z_q.flatten(2).transpose(1, 2), rows.z_q)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_of_indices_are_what_was_quantized_bit_for_bit(case, dtype):
    quantizer = trained(made(case))
    for shape in ((2, quantizer.dim, 3, 5), (2, 7, quantizer.dim)):
        found = quantizer(torch.randn(shape).to(dtype))
        codes = quantizer.codes_from_indices(found.indices)
        assert codes.dtype == torch.float32 and not found.losses
        assert torch.equal(codes.to(dtype), found.z_q) and found.z_q.dtype == dtype


@every
def test_in_float64(case):
    quantizer = made(case).double()
    trained(quantizer.train())
    z = torch.randn(2, 7, quantizer.dim, dtype=torch.float64)
    found = quantizer(z)
    assert found.z_q.dtype == torch.float64
    assert torch.equal(quantizer.codes_from_indices(found.indices).double(), found.z_q)


@every
def test_the_codebook_holds_all_codes(case):
    quantizer = trained(made(case))
    if quantizer.indices_shape:
        with pytest.raises(ValueError, match="no single codebook"):
            quantizer.codebook()
        return
    codes = quantizer.codebook()
    assert codes.shape == (quantizer.codebook_size, quantizer.dim)
    every_index = torch.arange(quantizer.codebook_size)[None]
    assert torch.equal(quantizer.codes_from_indices(every_index)[0], codes)


@every
def test_baked_gives_the_same_also_in_another_process(case, tmp_path):
    quantizer = trained(made(case))
    baked = quantizer.bake()
    z = torch.randn(3, 50, quantizer.dim)
    wanted, found = quantizer(z), baked(z)
    assert not baked.training
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.z_q, wanted.z_q)
    again = make(**baked.settings)
    again.load_state_dict(baked.state_dict())
    assert torch.equal(again.eval()(z).indices, wanted.indices)
    save_file({k: v.contiguous() for k, v in baked.state_dict().items()}, tmp_path / "baked.safetensors")
    assert set(load_file(tmp_path / "baked.safetensors")) == set(again.state_dict())


def test_baked_in_a_fresh_process(tmp_path):
    jobs = {}
    for name, case in zip(IDS, CASES, strict=True):
        if name.endswith("-0"):
            quantizer = trained(made(case))
            baked, z = quantizer.bake(), torch.randn(1, 50, quantizer.dim)
            tensors = {k: v.clone() for k, v in baked.state_dict().items()}
            save_file(tensors, tmp_path / f"{name}.weights")
            save_file({"z": z, "indices": quantizer(z).indices}, tmp_path / f"{name}.wanted")
            jobs[name] = baked.settings
    script = f"""
import torch
from safetensors.torch import load_file
from genkit.quantizers import make
torch.set_num_threads(1)
for name, settings in {jobs!r}.items():
    quantizer, wanted = make(**settings).eval(), load_file(f"{tmp_path}/{{name}}.wanted")
    quantizer.load_state_dict(load_file(f"{tmp_path}/{{name}}.weights"))
    assert torch.equal(quantizer(wanted["z"]).indices, wanted["indices"]), name
print("same", end="")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "same", done.stderr


@every
def test_autocast_changes_nothing(case):
    quantizer = trained(made(case))
    z = torch.randn(2, 40, quantizer.dim).bfloat16()
    plain = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z)
        codes = quantizer.codes_from_indices(plain.indices)
    assert torch.equal(plain.indices, cast.indices) and torch.equal(plain.z_q, cast.z_q)
    assert torch.equal(codes, quantizer.codes_from_indices(plain.indices))
    quantizer.train()
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    plain = quantizer(z)
    quantizer.load_state_dict(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z)
    assert torch.equal(plain.indices, cast.indices)
    for name, loss in plain.losses.items():
        assert loss.dtype == torch.float32 and torch.equal(loss, cast.losses[name]), name


@every
def test_half_precision_has_gradients_of_its_type(case):
    quantizer = made(case)
    z = torch.randn(2, 40, quantizer.dim).bfloat16().requires_grad_()
    found = quantizer(z)
    (found.z_q.float().square().sum() + sum(found.losses.values())).backward()
    assert z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all() and z.grad.abs().sum() > 0


@every
def test_nothing_draws_from_the_global_random_state(case):
    def run():
        quantizer = made(case)
        z = torch.linspace(-2, 2, 80 * quantizer.dim).view(2, 40, quantizer.dim).sin() * 2
        z.requires_grad_()
        found = quantizer(z)
        (found.z_q.square().sum() + sum(found.losses.values())).backward()
        return quantizer.eval()(z).z_q.detach(), z.grad

    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    first = run()
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()
    torch.manual_seed(7)
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)


@every
def test_state_is_taken_up_exactly(case):
    """A run that stops and goes on from its state is the run that does not."""
    quantizer, other = made(case), made(case)
    batches = torch.randn(4, 2, 40, quantizer.dim)
    for z in batches[:2]:
        quantizer(z)
    other.load_state_dict({k: v.clone() for k, v in quantizer.state_dict().items()})
    for z in batches[2:]:
        a, b = quantizer(z), other(z)
        assert torch.equal(a.indices, b.indices) and torch.equal(a.z_q, b.z_q)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@every
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(case, wrong):
    quantizer = trained(made(case))
    z = torch.randn(2, 9, quantizer.dim)
    broken = z.clone()
    broken[1, 4, 0] = wrong
    hit = torch.zeros(2, 9, dtype=torch.bool)
    hit[1, 4] = True
    found, whole = quantizer(broken), quantizer(z)
    assert found.z_q[hit].isnan().all() and torch.equal(found.z_q[~hit], whole.z_q[~hit])
    assert torch.equal(found.indices[~hit], whole.indices[~hit])
    if case[1].get("shared"):  # what moving averages made of it at the first depth is searched at the second
        with pytest.raises(ValueError, match="codebook: some values are not finite"):
            quantizer.train()(broken)
        return
    trainee = quantizer.train()(broken)
    assert torch.equal(trainee.z_q.isnan().all(2), hit)
    for indices in (found.indices, trainee.indices):
        assert 0 <= indices.min() and indices.max() < quantizer.codebook_size


@every
def test_evaluation_learns_nothing(case):
    quantizer = made(case).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 40, quantizer.dim))
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@every
def test_what_is_frozen_is_no_parameter(case):
    """Else a checkpoint, which holds what is trained, would not hold it."""
    assert all(p.requires_grad for p in made(case).parameters())


@every
def test_bad_input(case):
    quantizer = made(case).eval()
    d, own = quantizer.dim, quantizer.indices_shape
    for z in (torch.randn(2, d + 1, 3, 3), torch.randn(2, 3, d + 1), torch.randn(2, d), torch.ones(2, 3, d).long()):
        with pytest.raises(ValueError, match=rf"z of shape .*accepted are floats \(B, {d}, H, W\) and \(B, N, {d}\)"):
            quantizer(z)
    zero = torch.zeros(2, 3, *own, dtype=torch.int64)
    for index in (-1, quantizer.codebook_size):
        wrong = zero.clone()
        wrong.view(-1)[0] = index
        with pytest.raises(ValueError, match=rf"accepted are 0 to {quantizer.codebook_size - 1}"):
            quantizer.codes_from_indices(wrong)
    with pytest.raises(ValueError, match="accepted are integers"):
        quantizer.codes_from_indices(zero.float())
    with pytest.raises(ValueError, match="accepted are integers"):
        quantizer.codes_from_indices(zero.bool())
    for shape in ((2, *own), (2, 3, 3, 3, *own), (2, 3, *own, 9)):
        if len(own) or len(shape) != 3:
            with pytest.raises(ValueError, match=r"indices of shape .*accepted are \(B, H, W\) and \(B, N\)"):
                quantizer.codes_from_indices(torch.zeros(shape, dtype=torch.int64))
    assert quantizer.codes_from_indices(zero.int()).shape == (2, 3, d)


@pytest.mark.parametrize("name", names())
def test_bad_settings(name):
    settings = SETTINGS.get(name, [TABLE])[0]
    for wrong in (0, -3, "many"):
        with pytest.raises(ValueError, match=rf"quantizer '{name}': dim={wrong!r}"):
            make(name, **settings | {"dim": wrong})
    with pytest.raises(ValueError, match=f"quantizer '{name}': setting='codebook_sice' is not known"):
        make(name, **settings, codebook_sice=3)
    with pytest.raises(ValueError, match=f"quantizer '{name}'.*dim is missing"):
        make(name, **{k: v for k, v in settings.items() if k != "dim"})
    if "codebook_size" in settings:
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=f"codebook_size={wrong}: Input should be greater than or equal to 1"):
                make(name, **settings | {"codebook_size": wrong})
    if issubclass(members("genkit.quantizers", Quantizer)[name].Config, CodebookConfig):
        for option in ({"estimator": "straight"}, {"measure": "manhattan"}, {"beta": -1.0}, {"chunk_size": 0}):
            (key,) = option
            with pytest.raises(ValueError, match=f"{key}="):
                make(name, **settings | option)
        with pytest.raises(ValueError, match="entropy_tau without effect: entropy_weight is 0"):
            make(name, **settings | {"entropy_tau": 1.0, "entropy_weight": 0.0})


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(kind="grouped", dim=4, groups=3, quantizer={}), "quantizer 'grouped': groups=3 does not divide dim=4"),
        (
            dict(kind="grouped", dim=4, groups=2, quantizer=dict(kind="vq", codebook_size=0)),
            "quantizer 'grouped': the quantizer of its parts: quantizer 'vq': codebook_size=0: ",
        ),
        (
            dict(kind="residual", dim=4, depth=2, quantizer=dict(kind="vqq")),
            "quantizer 'residual': the quantizer of its parts: quantizer='vqq' is not known; did you mean 'vq'",
        ),
        (
            dict(kind="residual", dim=4, depth=2, quantizer=dict(kind="vq")),
            "quantizer 'residual': the quantizer of its parts: quantizer 'vq': codebook_size is missing",
        ),
        (
            dict(kind="residual", dim=4, depth=2, quantizer="vq"),
            "quantizer 'residual': quantizer='vq': Input should be",
        ),
    ],
)
def test_errors_say_whose_they_are(settings, text):
    with pytest.raises(ValueError, match=text):
        make(**settings)


def test_an_unknown_quantizer():
    with pytest.raises(ValueError, match="quantizer='fvqs' is not known; did you mean 'fvq'"):
        make("fvqs", dim=3)


@every
def test_stats_of_one_index(case):
    """Perplexity is 1 and usage 1/K where all vectors have the same index, K and 1 where all indices occur."""
    quantizer = made(case)
    k, own = quantizer.codebook_size, quantizer.indices_shape
    one = quantizer.stats(torch.zeros(50, *own, dtype=torch.int64))
    assert one["perplexity"] == 1 and one["usage"] == pytest.approx(1 / k)
    cell = torch.arange(k).view(k, *[1] * len(own)).expand(k, *own)
    all_of_them = quantizer.stats(cell)
    assert all_of_them["perplexity"] == pytest.approx(k, rel=1e-6) and all_of_them["usage"] == 1
