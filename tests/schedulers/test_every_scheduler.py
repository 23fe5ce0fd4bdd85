"""What holds for every scheduler of the package: a new file is tried without a word, and can add settings below."""

import diffusers
import pytest
import torch

from genkit.denoisers import FunctionDenoiser, FunctionFlowMap
from genkit.registry import members
from genkit.rng import ItemRNG
from genkit.sampling import sample, trajectory
from genkit.schedulers import RenoiseScheduler
from genkit.schedulers.base import PathScheduler
from genkit.testing.oracles import Gaussian
from tests.schedulers.affine import moments

F64 = torch.float64
SCHEDULERS = members("genkit.schedulers", PathScheduler)
# Beside the defaults: what takes another branch of ``step``.
SETTINGS = {
    "exact_denoiser": [dict(noise_scale=1.0)],
    "flow_map": [dict(stochastic=True)],
    "interpolant": [
        dict(diffusion_form="none"),
        dict(diffusion_form="none", integrator="heun"),
        dict(integrator="heun", last_step="tweedie", last_step_size=0.005),
        dict(diffusion_form="sbdm", integrator="exact", last_step="none", last_step_size=0.005),
    ],
    "pndm": [dict(warmup="prk"), dict(warmup="ramp", solver_order=2), dict(warmup="prk", space="v")],
}
CASES = [(name, settings) for name in SCHEDULERS for settings in ({}, *SETTINGS.get(name, ()))]
VP = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS = ("epsilon", "sample", "v_prediction")
STEPS = 9
every = pytest.mark.parametrize(
    "name, settings", CASES, ids=[f"{n}-{','.join(map(str, s.values()))}" if s else n for n, s in CASES]
)
on_both_paths = pytest.mark.parametrize("path", [None, VP], ids=["linear", "vp"])


def make(name, settings, path=None, steps=STEPS):
    scheduler = SCHEDULERS[name](path=path, **settings)
    scheduler.set_timesteps(steps)
    return scheduler


def law_of(scheduler, **kwargs):
    kwargs = dict(mean=[1.0, -2.0], std=[0.5, 0.3]) | kwargs
    return Gaussian(**kwargs, interpolant=scheduler.interpolant)


def network_of(scheduler, law=None):
    """The exact network of ``law``: of jumps where the scheduler is for those, one time or two."""
    law = law or law_of(scheduler)
    if isinstance(scheduler, RenoiseScheduler):
        path, kind = scheduler.interpolant, scheduler.prediction_type

        def clean(x, t):
            return path.convert(law.flow_map(x, t, torch.zeros_like(t)), "sample", kind, x, t)

        return FunctionDenoiser(clean, path, kind)
    if not hasattr(scheduler, "jump_target"):
        return law.denoiser(scheduler.prediction_type)

    def jump(x, t, s):
        return (law.flow_map(x, t, s) - x) / (s - t)[:, None].to(x.dtype)

    return FunctionFlowMap(jump, scheduler.interpolant)


def noise(n=4, dtype=F64):
    return torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)


def generators(items=range(4)):
    return ItemRNG(0, items).generators()


def run(scheduler, x=None, law=None, **kwargs):
    x = noise() if x is None else x
    kwargs.setdefault("generators", generators(range(len(x))))
    return sample(network_of(scheduler, law), scheduler, x, **kwargs)


def draws(scheduler):
    """Whether it is random; leaves it at the start of a run."""
    states = generators()
    before = [g.get_state() for g in states]
    steps = scheduler.num_inference_steps
    run(scheduler, generators=states)
    scheduler.set_timesteps(steps)
    return any(not torch.equal(g.get_state(), b) for g, b in zip(states, before, strict=True))


@every
def test_prediction_types_agree(name, settings):
    """One law, told as noise, clean sample and ``v``."""
    ends = torch.stack([run(make(name, settings, VP | {"prediction_type": kind})) for kind in KINDS])
    torch.testing.assert_close(ends, ends[:1].expand_as(ends), rtol=0, atol=1e-6)  # the table's first sigma is small
    assert ends.std() > 0.1


@on_both_paths
@every
def test_the_law_is_reached(name, settings, path):
    """Mean and deviation of a Gaussian, exactly propagated; jumps have no error at all."""
    scheduler = make(name, settings, path, steps=200)
    law = law_of(scheduler, mean=[0.7], std=0.5)
    if hasattr(scheduler, "jump_target") or isinstance(scheduler, RenoiseScheduler):
        one = make(name, settings, path, steps=1)
        x = noise()[:, :1]
        torch.testing.assert_close(run(one, x, law), law.flow_map(x, one.times[0], one.times[1]), rtol=0, atol=1e-12)
        if draws(scheduler):  # 200 jumps to data and back are 200 ways to err
            x = torch.randn(20_000, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
            x = run(make(name, settings, path, steps=4), x, law, generators=torch.Generator().manual_seed(2))
            assert (x.mean().item(), x.std().item()) == pytest.approx((0.7, 0.5), abs=0.02)
        else:
            x = run(scheduler, noise()[:, :1], law)
            wanted = law.flow_map(noise()[:, :1], scheduler.times[0], scheduler.times[-1])
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-9)
        return
    alpha, sigma = (float(c(scheduler.times[0])) for c in (scheduler.interpolant.alpha, scheduler.interpolant.sigma))
    start = alpha * 0.7, (alpha**2 * 0.25 + sigma**2) ** 0.5
    assert moments(scheduler, law, start)[-1] == pytest.approx((0.7, 0.5), abs=0.02)


@pytest.mark.parametrize("steps", [1, STEPS])
@every
def test_a_constant_denoiser_is_exact(name, settings, steps):
    """Data at a point: every straight line ends there, whatever the steps; of random ones the last mean does."""
    scheduler = make(name, settings, steps=steps)
    target = torch.tensor([1.0, -2.0], dtype=F64)

    def point(x, t, s=None):
        return (x - target) / t[:, None]

    jumps = hasattr(scheduler, "jump_target")
    path = scheduler.interpolant
    network = FunctionFlowMap(point, path) if jumps else FunctionDenoiser(point, path, "flow_prediction")
    end = sample(network, scheduler, noise(), generators=generators())
    if scheduler.config.get("diffusion_form", "none") != "none" and scheduler.config.last_step in ("mean", "none"):
        assert (end - target).norm() < (noise() - target).norm()  # their last mean is not the clean sample
    else:
        torch.testing.assert_close(end, target.expand_as(end), rtol=0, atol=1e-10)
    assert end.isfinite().all() and network.calls == len(scheduler.timesteps)


@on_both_paths
@every
def test_samples_do_not_depend_on_their_batch(name, settings, path):
    whole = run(make(name, settings, path))
    for items in ([0], [2, 1]):
        part = run(make(name, settings, path), noise()[items], generators=generators(items))
        torch.testing.assert_close(part, whole[items], rtol=0, atol=1e-10)


@every
def test_gather_is_indexing_or_refused(name, settings):
    scheduler = make(name, settings)
    # A generator at two rows would be drawn from twice: where there is noise the rows only change places.
    index = torch.tensor([3, 2, 0, 1]) if draws(scheduler) else torch.tensor([3, 3, 0, 1])
    whole, places = run(make(name, settings)), []
    for k in range(len(scheduler.timesteps)):
        try:
            got = run(make(name, settings), callback=lambda s, k=k: s.gather(index) if s.i == k else s)
        except ValueError as error:
            assert "cannot re-index" in str(error) and make(name, settings).remembered() == []
            continue
        torch.testing.assert_close(got, whole[index], rtol=0, atol=1e-12)
        places.append(k)
    assert places or not hasattr(scheduler, "gather")


@every
def test_what_is_said_of_samples_kept_is_true(name, settings):
    """Where it is said that none are, none of those seen is found in what is kept."""
    scheduler, seen = make(name, settings), [noise()]
    for state in trajectory(network_of(scheduler), scheduler, noise(), generators=generators()):
        if not scheduler.remembers_samples:
            kept = [vars(scheduler)[n] for n in scheduler.remembered()]
            assert not any(torch.equal(t, x) for t in tensors(kept) for x in seen if t.shape == x.shape)
        seen.append(state.x)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for v in value for t in tensors(v)] if hasattr(value, "__iter__") and not isinstance(value, str) else []


@every
def test_setting_times_forgets_the_last_run(name, settings):
    scheduler = make(name, settings)
    fresh = run(make(name, settings))
    for cut in range(len(scheduler.timesteps)):
        for state in trajectory(network_of(scheduler), scheduler, noise(7), generators=generators(range(7))):
            if state.i == cut:
                break
        scheduler.set_timesteps(STEPS)
        assert scheduler.remembered() == [] and scheduler.step_index is None
        assert torch.equal(run(scheduler), fresh)
        scheduler.set_timesteps(STEPS)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@every
def test_half_precision(name, settings, half):
    """The sample's dtype is kept, whatever the network's, and a network in half precision alone rounds no sample."""

    def ends(dtype, of_network):
        scheduler = make(name, settings)
        x = noise(dtype=dtype)
        states = [torch.Generator().manual_seed(i) for i in range(len(x))]
        for timestep in scheduler.timesteps:
            t = scheduler.times[scheduler._index(timestep)].expand(len(x))
            if hasattr(scheduler, "jump_target"):
                s = scheduler.jump_target(timestep).expand(len(x))
                output = network_of(scheduler).average_velocity(x.double(), t, s)
            else:
                output = law_of(scheduler).predict(scheduler.prediction_type, x.double(), t)
            x = step(scheduler, output.to(of_network), timestep, x, generator=states)
            assert x.dtype == dtype
        return x.double()

    def step(scheduler, output, timestep, x, generator):
        scheduler._noise = lambda like, _: torch.stack(
            [torch.randn(like.shape[1:], generator=g, dtype=F64) for g in generator]
        ).to(like.dtype)
        return scheduler.step(output, timestep, x, return_dict=False)[0]

    exact, digits = ends(F64, F64), torch.finfo(half).eps
    assert (ends(half, half) - exact).abs().max() < 60 * digits
    assert (ends(torch.float32, torch.float32) - exact).abs().max() < 1e-4
    mixed = ends(torch.float32, half)
    assert (mixed - exact).abs().max() < 60 * digits and not torch.equal(mixed, mixed.to(half).double())


@every
def test_a_run_may_begin_part_of_the_way(name, settings):
    """Image to image; it is refused, or walks the remaining evaluations to the end."""
    law = law_of(make(name, settings), mean=[1.0, -2.0], std=[1e-6, 1e-6])
    begun = []
    for begin in range(len(make(name, settings).timesteps)):
        scheduler = make(name, settings)
        scheduler.set_begin_index(begin)
        x = scheduler.scale_noise(law.means[0].expand(4, 2), scheduler.timesteps[begin : begin + 1], noise())
        try:
            for timestep in scheduler.timesteps[begin:]:
                t = scheduler.times[begin if scheduler.step_index is None else scheduler.step_index].expand(4)
                if hasattr(scheduler, "jump_target"):
                    output = network_of(scheduler, law).average_velocity(
                        x, t, scheduler.jump_target(timestep).expand(4)
                    )
                else:
                    output = law.predict(scheduler.prediction_type, x, t)
                x = scheduler.step(output, timestep, x, return_dict=False)[0]
        except ValueError as error:
            assert "begin at" in str(error)
            continue
        begun.append(begin)
        assert scheduler.step_index == len(scheduler.timesteps)
        near = 1.0 if draws(make(name, settings)) else 1e-4
        torch.testing.assert_close(x, law.means[0].expand(4, 2), rtol=0, atol=near)
    assert 0 in begun and len(begun) > 2


@pytest.mark.parametrize("kind", KINDS)
@every
def test_a_start_without_signal_works_or_is_refused(name, settings, kind):
    """``alpha = 0``: before the first call, or the law is reached as from elsewhere."""
    path = VP | {"rescale_betas_zero_snr": True, "prediction_type": kind}
    scheduler = SCHEDULERS[name](path=path, **settings)
    try:
        scheduler.set_timesteps(100)
    except ValueError as error:
        assert "alpha = 0" in str(error)
        return
    end = run(scheduler, noise(2000), generators=torch.Generator().manual_seed(0))
    assert end.mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.06)
    assert end.std(0).tolist() == pytest.approx([0.5, 0.3], abs=0.06)


@on_both_paths
@every
def test_saved_and_loaded(name, settings, path, tmp_path):
    original = make(name, settings, path)
    original.save_pretrained(tmp_path)
    loaded = SCHEDULERS[name].from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in original.config.items() if k[0] != "_"
    }
    loaded.set_timesteps(STEPS)
    assert torch.equal(run(loaded), run(original))


@pytest.mark.parametrize("given", [diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), diffusers.DDIMScheduler()])
@every
def test_made_from_the_scheduler_of_a_model(name, settings, given):
    scheduler = SCHEDULERS[name].from_scheduler(given, **settings)
    scheduler.set_timesteps(STEPS)
    end = run(scheduler)
    assert end.isfinite().all() and (end - torch.tensor([1.0, -2.0])).abs().max() < 4


@every
def test_a_generator_held_is_a_generator_given(name, settings):
    if not draws(make(name, settings)):
        return
    held = make(name, settings)
    held.set_generator(generators())
    assert torch.equal(run(held, generators=None), run(make(name, settings)))
