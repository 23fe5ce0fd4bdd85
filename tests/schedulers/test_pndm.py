"""PseudoNumericalScheduler: published orders, invariants, Diffusers' own PNDM, and pipelines."""

import copy
import importlib.util
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from genkit import guided, sample
from genkit.guidance import CFG
from genkit.interpolants import PREDICTION_TYPES, DiscreteVP, Linear, VariancePreserving
from genkit.sampling import trajectory
from genkit.schedulers import PseudoNumericalScheduler
from genkit.schedulers.pndm import adams_weights
from genkit.testing import tiny
from genkit.testing.oracles import GaussianMixture, probability_flow

F64 = torch.float64
WARMUPS = ("prk", "improved_euler", "ramp")
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def mixture(path):
    return GaussianMixture(
        [[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], [0.4, 0.3, 0.5], [0.4, 0.35, 0.25], interpolant=path
    )


def noise(n=16):
    return torch.randn(n, 2, dtype=F64)


def scheduler_on(path, prediction_type="flow_prediction", **settings):
    scheduler = PseudoNumericalScheduler(**settings)
    scheduler.interpolant, scheduler.prediction_type = path, prediction_type
    return scheduler


def on_betas(prediction_type="epsilon", **settings):
    settings = dict(timestep_spacing="leading") | settings
    original = diffusers.DDIMScheduler(prediction_type=prediction_type, **STABLE_DIFFUSION)
    return PseudoNumericalScheduler.from_scheduler(original, **settings)


# -- accuracy -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def order():
    """The benchmark, which holds the table."""
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("pndm_order", folder / "pndm_order.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(sys.modules, "pndm_order", module)
        spec.loader.exec_module(module)
    assert len(module.TABLE) == 13
    return module


@pytest.mark.parametrize("row", range(13))
def test_errors_and_orders_on_the_mixture(row, order):
    path, method, settings, samples, stated_errors, stated_orders = order.TABLE[row]
    errors = order.errors(path, method, settings, samples)
    assert errors == pytest.approx(stated_errors, rel=0.06)  # two digits are stated
    assert order.orders(errors, len(stated_orders)) == pytest.approx(stated_orders, abs=0.3)


def test_v_prediction_is_as_accurate_as_epsilon_where_diffusers_is_not(order):
    theirs = {m: order.trained_errors(order.discrete(diffusers.PNDMScheduler, m), m) for m in order.MODELS}
    ours = {m: order.trained_errors(order.discrete(PseudoNumericalScheduler, m, **order.PLMS), m) for m in order.MODELS}
    assert theirs["v_prediction"][2] > 60 * theirs["epsilon"][2]
    assert ours["v_prediction"] == pytest.approx(ours["epsilon"], rel=1e-9)
    assert ours["v_prediction"][2] < theirs["v_prediction"][2] / 60


def test_unequal_steps_keep_the_order():
    """Shifted flow times, as Stable Diffusion 3 and Flux have them."""
    law, x = mixture(Linear()), noise(32)
    exact, errors = probability_flow(law.velocity, x, 1.0, 0.0, 500), []
    for steps in (80, 160):
        scheduler = PseudoNumericalScheduler(shift=3.0, warmup="prk")
        scheduler.set_timesteps(steps)
        errors.append((sample(law.denoiser(), scheduler, x) - exact).norm(dim=1).mean().item())
    assert errors[1] < 1e-5 and errors[0] / errors[1] > 2**3.7


@pytest.mark.parametrize(
    "path, spaces", [(VariancePreserving(), ("eps", "v")), (Linear(), ("eps", "v")), (on_betas().interpolant, ("eps",))]
)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_every_prediction_type_gives_the_same_samples(path, spaces, warmup):
    x, law = noise(), mixture(path)
    for space in spaces:
        ends = []
        for kind in PREDICTION_TYPES:
            scheduler = scheduler_on(path, kind, space=space, warmup=warmup)
            scheduler.set_timesteps(timesteps=path.timestep(torch.tensor([0.95, 0.7, 0.5, 0.2, 0.1, 0.03], dtype=F64)))
            ends.append(sample(law.denoiser(kind), scheduler, x))
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


# -- invariants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [[1.0], [-1 / 2, 3 / 2], [5 / 12, -16 / 12, 23 / 12], [-9 / 24, 37 / 24, -59 / 24, 55 / 24]]
)
def test_weights_on_equal_distances_are_those_of_adams_and_bashforth(weights):
    nodes = 0.9 - 0.1 * torch.arange(len(weights), dtype=F64)
    assert adams_weights(nodes, nodes[-1] - 0.1) == pytest.approx(weights, abs=1e-12)


def test_weights_integrate_polynomials_on_any_distances():
    nodes, end = torch.tensor([3.0, 1.7, 1.1, 0.4], dtype=F64), torch.tensor(-0.3, dtype=F64)
    found = torch.tensor(adams_weights(nodes, end), dtype=F64)
    for n in range(4):
        mean = (end ** (n + 1) - nodes[-1] ** (n + 1)) / (n + 1) / (end - nodes[-1])
        assert (found * nodes**n).sum().item() == pytest.approx(mean.item(), abs=1e-12)


@pytest.mark.parametrize("space, path", [("eps", VariancePreserving()), ("v", Linear()), ("v", VariancePreserving())])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_uniform_and_variable_coefficients_agree_on_equal_steps(space, path, warmup):
    """In v they are one thing; in eps only where kappa, not t, has equal distances."""
    ends, x = [], noise()
    for coefficients in ("uniform", "variable"):
        scheduler = scheduler_on(path, space=space, warmup=warmup, coefficients=coefficients)
        scheduler.set_timesteps(8)
        ends.append(sample(mixture(path).denoiser(), scheduler, x))
    difference = (ends[0] - ends[1]).abs().max()
    assert difference < 1e-12 if space == "v" else difference > 1e-3


@pytest.mark.parametrize("coefficients", ["uniform", "variable"])
@pytest.mark.parametrize(
    "space, path", [("eps", VariancePreserving()), ("eps", on_betas().interpolant), ("v", Linear())]
)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_constant_outputs_are_integrated_exactly_from_wherever_a_run_begins(warmup, space, path, coefficients):
    """Every move ends at the noise level of the next evaluation, also from the middle of a warm-up step."""
    x0, eps = noise(), noise()
    kind = "epsilon" if space == "eps" else "flow_prediction"
    scheduler = scheduler_on(path, kind, space=space, warmup=warmup, coefficients=coefficients)
    scheduler.set_timesteps(6)
    calls = len(scheduler.timesteps)
    for begin in range(calls):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(begin)
        x = path.interpolate(x0, eps, scheduler.times[begin])
        for i in range(begin, calls):
            torch.testing.assert_close(x, path.interpolate(x0, eps, scheduler.times[i]), rtol=0, atol=1e-10)
            x = scheduler.step(path.target(kind, x0, eps, scheduler.times[i]), scheduler.timesteps[i], x).prev_sample
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [dict(warmup=w, coefficients=c) for w in WARMUPS for c in ("uniform", "variable")])
def test_one_step_is_ddim(settings):
    path, x = VariancePreserving(), noise()
    scheduler = scheduler_on(path, "epsilon", **settings)
    scheduler.set_timesteps(1)
    assert len(scheduler.timesteps) == 1
    law = mixture(path)
    torch.testing.assert_close(
        sample(law.denoiser("epsilon"), scheduler, x), law.denoise(x, torch.ones((), dtype=F64)), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    "settings, calls",
    [
        (dict(warmup="prk"), 19),
        (dict(warmup="prk", solver_order=3), 16),
        (dict(warmup="prk", solver_order=2), 13),
        (dict(warmup="improved_euler"), 11),
        (dict(warmup="improved_euler", solver_order=2), 11),
        (dict(warmup="ramp"), 10),
        (dict(warmup="prk", solver_order=1), 10),
    ],
)
def test_network_calls_are_as_many_as_timesteps(settings, calls):
    scheduler = PseudoNumericalScheduler(**settings)
    scheduler.set_timesteps(10)
    denoiser = mixture(Linear()).denoiser()
    states = list(trajectory(denoiser, scheduler, noise()))
    assert denoiser.calls == len(states) == len(scheduler.timesteps) == calls
    assert len(scheduler.times) == len(scheduler.sigmas) == calls + 1
    assert scheduler.num_inference_steps == 10 and scheduler.step_index == calls
    assert bool((scheduler.times[:-1] >= scheduler.times[1:]).all()) and scheduler.times[-1] == 0


def test_stages_of_the_warm_ups():
    scheduler = PseudoNumericalScheduler(warmup="prk", solver_order=2)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 875, 875, 750, 750, 500, 250]
    scheduler = PseudoNumericalScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.0)
    assert scheduler.timesteps.tolist() == [1000, 750, 750, 500, 250]
    path = on_betas().interpolant
    scheduler = scheduler_on(path, "epsilon", warmup="prk")
    scheduler.set_timesteps(timesteps=[900, 800, 700, 600])
    t, middle, _, u = (path.sigma(scheduler.times[:4]) / path.alpha(scheduler.times[:4])).tolist()
    assert middle == pytest.approx((t + u) / 2, rel=1e-12)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_gather_goes_on_from_the_history_of_the_chosen(warmup):
    denoiser, x = mixture(Linear()).denoiser(), noise(5)
    index = torch.tensor([3, 3, 0, 4, 4])

    class Swap:
        def __init__(self, at):
            self.at = at

        def start_run(self, *run):
            pass

        def after_evaluation(self, state):
            return state.gather(index) if state.i == self.at else state

        def after_step(self, state):
            return state

    def run(particles=None):
        scheduler = PseudoNumericalScheduler(warmup=warmup)
        scheduler.set_timesteps(7)
        return sample(denoiser, scheduler, x, particles=particles), len(scheduler.timesteps)

    wanted, calls = run()
    for at in range(calls):
        torch.testing.assert_close(run(Swap(at))[0], wanted[index], rtol=0, atol=1e-12)


def test_runs_do_not_touch_one_another():
    denoiser, x = mixture(Linear()).denoiser(), noise()
    scheduler = PseudoNumericalScheduler(warmup="prk")
    scheduler.set_timesteps(6)
    wanted = sample(denoiser, scheduler, x)
    scheduler.set_timesteps(6)
    begun = trajectory(denoiser, scheduler, x)
    for _ in range(3):
        next(begun)
    other = copy.deepcopy(scheduler)  # in the middle of a stage
    for state in begun:
        end = state.x
    assert torch.equal(end, wanted) and other.step_index == 3
    other.set_timesteps(6)
    assert torch.equal(sample(denoiser, other, x), wanted)
    other.set_timesteps(6)
    torch.testing.assert_close(sample(denoiser, other, x[5:7]), wanted[5:7], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_and_remembered_in_float32(dtype):
    scheduler, x = PseudoNumericalScheduler(solver_order=2, warmup="ramp"), noise().to(dtype)
    scheduler.set_timesteps(3)
    outputs = [noise().to(dtype), noise().to(dtype)]
    y = scheduler.step(outputs[0], scheduler.timesteps[0], x).prev_sample
    z = scheduler.step(outputs[1], scheduler.timesteps[1], y).prev_sample
    assert y.dtype == z.dtype == dtype
    average = 1.5 * outputs[1].float() - 0.5 * outputs[0].float()
    torch.testing.assert_close(
        z, (y.float() - average / 3).to(dtype), rtol=1e-6 if dtype is torch.bfloat16 else 1e-3, atol=1e-3
    )


# -- ends of the path ---------------------------------------------------------------------------------------------


def zero_terminal(prediction_type, **settings):
    original = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type, **STABLE_DIFFUSION)
    return PseudoNumericalScheduler.from_scheduler(original, **settings)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("warmup, steps", [("prk", 1), ("prk", 2), ("prk", 5), ("improved_euler", 4), ("ramp", 3)])
def test_a_start_from_pure_noise_is_ddims(kind, warmup, steps):
    scheduler = zero_terminal(kind, warmup=warmup)
    scheduler.set_timesteps(steps)
    path, x = scheduler.interpolant, noise()
    law = mixture(path)
    states = list(trajectory(law.denoiser(kind), scheduler, x))
    assert len(states) == steps + {"prk": 9 if steps > 2 else 0, "improved_euler": 1, "ramp": 0}[warmup]
    assert path.alpha(scheduler.times[0]) == 0
    first = path.interpolate(law.denoise(x, scheduler.times[0]), x, scheduler.times[1])
    torch.testing.assert_close(states[0].x, first, rtol=0, atol=1e-12)
    assert states[-1].x.isfinite().all()


def test_a_start_from_pure_noise_converges():
    x, ends = noise(), []
    for steps in (25, 100, 400):
        scheduler = zero_terminal("v_prediction")
        scheduler.set_timesteps(steps)
        ends.append(sample(mixture(scheduler.interpolant).denoiser("v_prediction"), scheduler, x))
    coarse, fine = ((end - ends[2]).norm(dim=1).mean() for end in ends[:2])
    assert fine < coarse / 4 and fine < 0.02


def test_pure_noise_says_nothing_to_a_network_that_predicts_it():
    scheduler = zero_terminal("epsilon")
    with pytest.raises(ValueError, match="begin at t=1, where alpha = 0 and prediction_type='epsilon'"):
        scheduler.set_timesteps(4)
    scheduler.set_timesteps(timesteps=[998, 500])


def test_final_time():
    scheduler = on_betas(final="first")
    scheduler.set_timesteps(10)
    assert scheduler.times[-1] == 1e-3 and len(scheduler.timesteps) == 11
    scheduler.set_timesteps(timesteps=[800, 400, 0])  # a last evaluation that would go nowhere
    assert scheduler.timesteps.tolist() == [800, 400, 400]
    scheduler = on_betas()
    scheduler.set_timesteps(timesteps=[800, 400, 0])
    assert scheduler.times[-1] == 0 and scheduler.timesteps.tolist() == [800, 400, 400, 0]


# -- Diffusers' own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip, warmup", [(True, "improved_euler"), (False, "prk")])
def test_equals_diffusers_pndm_for_noise_predictions(skip, warmup):
    theirs = diffusers.PNDMScheduler(skip_prk_steps=skip, **STABLE_DIFFUSION)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    ours = PseudoNumericalScheduler.from_scheduler(
        theirs, warmup=warmup, coefficients="uniform", final="first", timestep_spacing="leading"
    )
    theirs.set_timesteps(50)
    ours.set_timesteps(50)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    law, x = mixture(ours.interpolant), noise()
    y = x
    for timestep in theirs.timesteps:
        t = ours.interpolant.time(timestep)
        x = ours.step(law.epsilon(x, t), timestep, x).prev_sample
        y = theirs.step(law.epsilon(y, t), timestep, y).prev_sample
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


# -- pipelines ----------------------------------------------------------------------------------------------------


def images(pipe, name, steps=4, **arguments):
    calls = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with_hook = network.register_forward_hook(lambda *_: calls.append(1))
    out = pipe(**tiny.call_arguments(name, steps) | arguments).images
    with_hook.remove()
    return torch.as_tensor(out), len(calls)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("warmup, extra", [("prk", 9), ("improved_euler", 1)])
def test_pipelines_run_and_reload(name, warmup, extra, tiny_pipeline, tmp_path):
    pipe, ends = tiny_pipeline(name), []
    pipe.scheduler = PseudoNumericalScheduler.from_scheduler(pipe.scheduler, warmup=warmup, timestep_spacing="trailing")

    def count(pipe, i, t, kwargs):
        ends.append(i)
        return kwargs

    before, calls = images(pipe, name, steps=8, callback_on_step_end=count)
    assert calls == len(ends) == len(pipe.scheduler.timesteps) == 8 + extra
    assert before.isfinite().all() and before.std() > 0.01
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.warmup == warmup
    assert type(again.scheduler.interpolant) is type(pipe.scheduler.interpolant)
    torch.testing.assert_close(images(again, name, steps=8)[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("sd15", dict(final="first", timestep_spacing="leading")),  # DDIM
        ("sdxl", dict(timestep_spacing="leading")),  # Euler in sigma / alpha is DDIM
        ("sd3", {}),
        ("flux", {}),
    ],
)
def test_order_one_is_what_the_pipeline_came_with(name, settings, tiny_pipeline):
    pipe = tiny_pipeline(name)
    arguments = dict(sigmas=[1.0, 0.75, 0.5, 0.25]) if name in ("sd3", "flux") else {}
    wanted, _ = images(pipe, name, **arguments)
    pipe.scheduler = PseudoNumericalScheduler.from_scheduler(pipe.scheduler, solver_order=1, **settings)
    torch.testing.assert_close(images(pipe, name, **arguments)[0], wanted, rtol=0, atol=2e-5)


def test_stable_diffusion_as_its_own_pndm(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    wanted, _ = images(pipe, "sd15", steps=10)
    pipe.scheduler = PseudoNumericalScheduler.from_config(
        pipe.scheduler.config, coefficients="uniform", final="first", timestep_spacing="leading"
    )
    torch.testing.assert_close(images(pipe, "sd15", steps=10)[0], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_image_to_image(name, warmup, tiny_pipeline):
    pipe = tiny_pipeline(name)
    cls = {"sd15": diffusers.StableDiffusionImg2ImgPipeline, "sd3": diffusers.StableDiffusion3Img2ImgPipeline}[name]
    pipe = cls(
        **{k: v for k, v in pipe.components.items()}, **({"requires_safety_checker": False} if name == "sd15" else {})
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PseudoNumericalScheduler.from_scheduler(pipe.scheduler, warmup=warmup, timestep_spacing="trailing")
    image = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    for strength in (1.0, 0.9, 0.6, 0.3):
        out, calls = images(pipe, name, steps=10, image=image, strength=strength, height=None, width=None)
        begin = round(10 * (1 - strength))
        assert pipe.scheduler.begin_index == begin and calls == len(pipe.scheduler.timesteps) - begin
        assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps) and out.isfinite().all()


def test_guided_as_the_pipeline_itself(tiny_pipeline):
    """A time that comes twice is guided twice."""
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = PseudoNumericalScheduler.from_scheduler(pipe.scheduler, warmup="prk", timestep_spacing="trailing")
    wanted, _ = images(pipe, "sd15", guidance_scale=4.0)
    with guided(pipe, CFG(guidance_scale=4.0)):
        found, calls = images(pipe, "sd15", guidance_scale=2.0)
    assert calls == 13
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(solver_order=5), "solver_order=5: must be 1, 2, 3 or 4"),
        (dict(warmup="pkr"), "warmup='pkr' is not known; did you mean 'prk'"),
        (dict(space="x0"), "space='x0' is not known. Accepted: auto, eps, v"),
        (dict(coefficients="constant"), "coefficients='constant' is not known"),
        (dict(final="last"), "final='last' is not known"),
        (dict(final="first"), "final='first': the path Linear has no first trained timestep"),
        (dict(path=dict(_class_name="EDMEulerScheduler")), "scales the network's input and output"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PseudoNumericalScheduler(**settings)


@pytest.mark.parametrize(
    "settings, steps, message",
    [
        (dict(warmup="prk"), dict(num_inference_steps=3), "num_inference_steps=3: warmup='prk' .* at least 4 steps"),
        (dict(warmup="prk"), dict(num_inference_steps=2), "at least 4 steps .or 1.; use warmup="),
        (dict(coefficients="uniform"), dict(sigmas=[1.0, 0.9, 0.5]), "needs steps of one length.*0.1 to 0.5"),
        (dict(coefficients="uniform", shift=3.0), dict(num_inference_steps=4), "use coefficients='variable'"),
        (dict(coefficients="uniform"), dict(sigmas=[1.0, 0.9]), "only the last may be shorter"),
        ({}, dict(sigmas=[0.5, 0.6]), "sigmas must give strictly decreasing times"),
    ],
)
def test_bad_schedules(settings, steps, message):
    scheduler = PseudoNumericalScheduler(**settings)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**steps)


def test_a_grid_that_rounds_is_no_uniform_one():
    for spacing in ("linspace", "trailing"):
        with pytest.raises(ValueError, match="coefficients='uniform' needs steps of one length"):
            on_betas(coefficients="uniform", timestep_spacing=spacing).set_timesteps(30)
    on_betas(coefficients="uniform", timestep_spacing="leading").set_timesteps(30)
    with pytest.raises(ValueError, match="final='first': no step begins above the final time 0.001"):
        on_betas(final="first").set_timesteps(timesteps=[0])


def test_models_on_another_path_are_refused_before_the_first_call(tiny_pipeline):
    denoiser = mixture(Linear()).denoiser()
    scheduler = on_betas()
    scheduler.set_timesteps(4)
    assert isinstance(scheduler.interpolant, DiscreteVP)
    with pytest.raises(ValueError, match="walks the path DiscreteVP, but the denoiser was made for Linear"):
        sample(denoiser, scheduler, noise())
    assert denoiser.calls == 0
    pipe = tiny_pipeline("flux")
    pipe.scheduler, calls = on_betas(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="mu=.* and this scheduler walks DiscreteVP: the pipeline's model is a flow"):
        pipe(**tiny.call_arguments("flux"))
    assert not calls
