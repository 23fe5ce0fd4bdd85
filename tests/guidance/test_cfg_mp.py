"""CFG-MP: the affine oracle in float64, Anderson's method where the fixed point is known, the three ways to use it."""

import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.guidance import APG, CFG, Point, attach, guided
from genkit.guidance.cfg_mp import CFGMP, anderson_step, fixed_point
from genkit.interpolants import Linear, from_scheduler
from genkit.sampling import sample
from genkit.testing.oracles import Gaussian, two_class_mixture
from tests.guidance.ways import own_latents

F64 = torch.float64
EXACT = dict(ridge=0.0, tolerance=0.0)


def affine(a_c, b_c, a_u, b_u):
    """Velocities ``a x + b``, times-independent, and their condition for one sample."""

    def velocity(x, t, branch):
        branch = branch.view(-1, *(1,) * (x.ndim - 1))
        return torch.where(branch == 1, a_c * x + b_c, a_u * x + b_u)

    return FunctionDenoiser(velocity, Linear(), "flow_prediction")


def branches(n=1):
    return Condition({"branch": torch.ones(n, 1)}, {"branch": torch.zeros(n, 1)})


def moved(denoiser, x, h, **settings):
    """Where the projection at t = 0.8 with half step ``h`` ends."""
    x = torch.as_tensor(x, dtype=F64).reshape(-1, 1)
    t = torch.tensor(0.8, dtype=F64)
    guider = CFGMP(**EXACT | settings)
    answer, _ = guider.guide(Point(denoiser, x, t, t - 2 * h, None, branches(len(x))), None)
    return answer.z[:, 0]


def oracle_coefficients():
    """``(A_c, b_c)``, ``(A_u, b_u)`` of p_c = N(1, 0.25) and p_u = N(0, 1) at t = 0.8, read off their velocities."""
    t, found = torch.tensor(0.8, dtype=F64), []
    for law in (Gaussian([1.0], 0.5), Gaussian([0.0], 1.0)):
        at_0, at_1 = (law.velocity(torch.full((1, 1), x, dtype=F64), t).item() for x in (0.0, 1.0))
        found.append((at_1 - at_0, at_0))
    return found


def oracle():
    (a_c, b_c), (a_u, b_u) = oracle_coefficients()
    return affine(a_c, b_c, a_u, b_u)


# -- the affine oracle ----------------------------------------------------------------------------------------------

# h: rho, fixed point, Picard from 1.5 after 1, 2, 3 and 10 applications, two accelerated ones with the default ridge.
TABLE = {
    0.05: (0.983880, 3.817544, [1.537359, 1.574115, 1.610279, 1.847619], 3.757344),
    0.1: (0.962670, 3.296970, [1.567081, 1.631659, 1.693825, 2.068644], 3.294318),
    0.025: (0.992576, 4.144762, [1.519634, 1.539122, 1.558465, 1.689907], 3.310804),
}


def test_the_oracle_is_the_one_of_the_table():
    (a_c, b_c), (a_u, b_u) = oracle_coefficients()
    assert (a_c, b_c) == pytest.approx((1.153846, -1.230769), abs=1e-6)
    assert (a_u, b_u) == pytest.approx((0.882353, 0.0), abs=1e-6)


@pytest.mark.parametrize("h", TABLE)
def test_table(h):
    rho, fixed, picard, ridged = TABLE[h]
    (a_c, b_c), (a_u, b_u) = oracle_coefficients()
    assert (1 + h * a_u) * (1 - h * a_c) == pytest.approx(rho, abs=1e-6)
    assert (-h * b_c + (1 - h * a_c) * h * b_u) / (1 - (1 + h * a_u) * (1 - h * a_c)) == pytest.approx(fixed, abs=1e-6)
    close = dict(rtol=0, atol=6e-7)
    for k, expected in zip((1, 2, 3, 10), picard, strict=True):
        got = moved(oracle(), 1.5, h, iterations=k, anderson_window=0)
        torch.testing.assert_close(got, torch.tensor([expected], dtype=F64), **close)
    fixed = torch.tensor([fixed], dtype=F64)
    torch.testing.assert_close(moved(oracle(), 1.5, h, iterations=2), fixed, **close)
    ridge = CFGMP().ridge
    assert ridge == 1e-4
    torch.testing.assert_close(
        moved(oracle(), 1.5, h, iterations=2, ridge=ridge), torch.tensor([ridged], dtype=F64), **close
    )
    torch.testing.assert_close(moved(oracle(), 1.5, h, iterations=3, ridge=ridge), fixed, rtol=0, atol=1e-4)


def test_the_fixed_point_tends_to_where_the_gap_is_zero():
    (a_c, b_c), (a_u, b_u) = oracle_coefficients()
    zero_gap = (b_u - b_c) / (a_c - a_u)
    assert zero_gap == pytest.approx(4.533333, abs=1e-6)
    errors = [zero_gap - moved(oracle(), 1.5, h, iterations=2).item() for h in (0.002, 0.001)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.01)  # first order in h


def test_reversed_order():
    got = moved(oracle(), 1.5, 0.05, iterations=1, reversed_stop=0.3)
    torch.testing.assert_close(got, torch.tensor([1.540074], dtype=F64), rtol=0, atol=6e-7)
    not_yet = moved(oracle(), 1.5, 0.05, iterations=1, reversed_stop=0.1)
    torch.testing.assert_close(not_yet, torch.tensor([1.537359], dtype=F64), rtol=0, atol=6e-7)


def test_equal_fields_move_by_the_square_of_the_step():
    for h in (0.1, 0.05, 1e-3):
        drift = moved(affine(0.9, 0.3, 0.9, 0.3), 1.0, h, iterations=1).item() - 1
        assert drift / h**2 == pytest.approx(-1.08, abs=1e-9 / h**2 * 1e-6)


def test_equal_slopes_hardly_contract():
    h, slope = 0.05, 0.9
    a, b = moved(affine(slope, -1.0, slope, 0.5), [0.0, 1.0], h, iterations=1)
    assert (b - a).item() == pytest.approx(1 - h**2 * slope**2, abs=1e-14)


def test_the_note_tells_how_it_went():
    guider, t = CFGMP(iterations=2, **EXACT), torch.tensor(0.8, dtype=F64)
    answer, _ = guider.guide(Point(oracle(), torch.full((1, 1), 1.5, dtype=F64), t, t - 0.1, None, branches()), None)
    (a_c, b_c), (a_u, b_u) = oracle_coefficients()
    note = {name: value.item() for name, value in guider._notes.items()}
    assert note["applications"] == 2 and note["first_residual"] == pytest.approx(0.037359, abs=1e-6)
    assert note["last_residual"] == pytest.approx(0.983880 * 0.037359, abs=1e-6)
    assert note["displacement"] == pytest.approx(3.817544 - 1.5, abs=1e-6)
    z = answer.z.item()
    assert note["gap"] == pytest.approx(abs((a_c - a_u) * z + b_c - b_u), abs=1e-12)
    expected = a_u * z + b_u + 4.5 * ((a_c - a_u) * z + b_c - b_u)  # guided at the moved point
    assert answer.prediction.raw.item() == pytest.approx(expected, abs=1e-12)
    assert answer.prediction.z is answer.z


# -- Anderson's method ----------------------------------------------------------------------------------------------


def contraction(d):
    generator = torch.Generator().manual_seed(d)
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator))
    matrix = q @ torch.diag(torch.linspace(-0.7, 0.95, d, dtype=F64)) @ q.T
    shift = torch.randn(d, dtype=F64, generator=generator)
    fixed = torch.linalg.solve(torch.eye(d, dtype=F64) - matrix, shift)
    return (lambda z, rows: z @ matrix.T + shift), fixed


@pytest.mark.parametrize("d", [1, 2, 4, 6])
def test_affine_maps_are_solved_in_one_more_application_than_dimensions(d):
    apply, fixed = contraction(d)
    x = torch.randn(3, d, dtype=F64)
    z = fixed_point(apply, x, iterations=d + 1, window=d).z
    torch.testing.assert_close(z, fixed.expand(3, -1), rtol=1e-8, atol=1e-8)
    if d > 1:  # and not before
        assert (fixed_point(apply, x, iterations=d, window=d).z - fixed).abs().max() > 1e-3


def test_without_a_window_it_is_picard():
    apply, _ = contraction(4)
    x = torch.randn(3, 4, dtype=F64)
    z = x
    for _ in range(5):
        z = apply(z, None)
    torch.testing.assert_close(fixed_point(apply, x, iterations=5, window=0).z, z, rtol=1e-14, atol=1e-14)


def test_damping_weighs_the_image_against_the_iterate():
    apply, _ = contraction(4)
    x = torch.randn(3, 4, dtype=F64)
    z = fixed_point(apply, x, iterations=1, damping=0.25).z
    torch.testing.assert_close(z, 0.75 * x + 0.25 * apply(x, None), rtol=1e-14, atol=1e-14)


def test_the_weights_are_those_of_the_least_squares_problem():
    past = [(torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64)) for _ in range(3)]
    beta, rho = 0.7, 0.3
    got = anderson_step(past, damping=beta, ridge=rho)
    for i in range(2):
        (z0, f0), (z1, f1), (z2, f2) = [(z[i], f[i]) for z, f in past]
        rows = torch.cat((torch.stack((f2 - f0, f2 - f1), 1), rho * torch.eye(2, dtype=F64)))
        gamma = torch.linalg.lstsq(rows, torch.cat((f2, torch.zeros(2, dtype=F64)))[:, None]).solution[:, 0]
        weights = (gamma[0], gamma[1], 1 - gamma.sum())
        points = zip(weights, (z0, z1, z2), (f0, f1, f2), strict=True)
        expected = sum(w * ((1 - beta) * z + beta * (z + f)) for w, z, f in points)
        torch.testing.assert_close(got[i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3])
def test_residuals_that_do_not_change_leave_picard(window):
    shift = torch.tensor([0.1, -0.2], dtype=F64)
    z = fixed_point(lambda z, rows: z + shift, torch.zeros(1, 2, dtype=F64), iterations=4, window=window).z
    torch.testing.assert_close(z, 4 * shift[None], rtol=1e-6, atol=0)


def test_a_relative_ridge_knows_no_units():
    apply, fixed = contraction(4)
    x = torch.randn(1, 4, dtype=F64)

    def run(unit, **settings):
        scaled = lambda z, rows: unit * apply(z / unit, rows)  # noqa: E731
        return fixed_point(scaled, unit * x, iterations=5, window=2, ridge=0.3, **settings).z / unit

    torch.testing.assert_close(run(1e-4, relative_ridge=True), run(1.0, relative_ridge=True), rtol=1e-10, atol=1e-12)
    picard = fixed_point(apply, x, iterations=5, window=0).z
    torch.testing.assert_close(run(1e-4), picard, rtol=1e-5, atol=1e-5)  # the absolute one stalls
    assert (run(1.0) - picard).abs().max() > 1e-2


def test_the_trust_region_is_a_bound():
    free = moved(oracle(), [1.5, 3.9], 0.05, iterations=2)
    held = moved(oracle(), [1.5, 3.9], 0.05, iterations=2, trust_radius=0.5)
    torch.testing.assert_close(free, torch.full((2,), 3.817544, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(held, torch.tensor([2.0, 3.817544], dtype=F64), rtol=0, atol=1e-6)


def test_samples_stop_one_by_one():
    denoiser, fixed = oracle(), 3.8175438596491
    calls = []
    count = FunctionDenoiser(
        lambda *a, **k: calls.append(len(a[0])) or denoiser.network(*a, **k), Linear(), "flow_prediction"
    )
    guider, t = CFGMP(iterations=3, ridge=0.0, anderson_window=0), torch.tensor(0.8, dtype=F64)
    x = torch.tensor([[1.5], [fixed], [2.0]], dtype=F64)
    answer, _ = guider.guide(Point(count, x, t, t - 0.1, None, branches(3)), None)
    assert guider._notes["applications"].tolist() == [3, 1, 3]
    assert calls[:6] == [3, 3, 2, 2, 2, 2]
    assert torch.equal(answer.z[1], x[1]) and guider._notes["displacement"][1] == 0
    torch.testing.assert_close(answer.z[[0, 2], 0], moved(oracle(), [1.5, 2.0], 0.05, iterations=3, anderson_window=0))
    calls.clear()
    guider.guide(Point(count, x[1:2], t, t - 0.1, None, branches(1)), None)
    assert len(calls) == 3  # two for the one application, one batch for the rule


def test_iterates_are_kept_in_float32_around_a_network_in_half_precision():
    seen = []

    def velocity(x, t, branch):
        seen.append(x.dtype)
        return oracle().network(x.bfloat16(), t, branch)

    denoiser = FunctionDenoiser(velocity, Linear(), "flow_prediction")
    x, t = torch.full((1, 1), 1.5).bfloat16(), torch.tensor(0.8, dtype=F64)
    guider = CFGMP(iterations=3, anderson_window=0)
    answer, _ = guider.guide(Point(denoiser, x, t, t - 0.1, None, branches()), None)
    assert answer.z.dtype == torch.float32
    # bf16 keeps 1.5 and 1.5078 apart, and nothing between: the move of 0.11 would be 7 % off
    assert answer.z.item() == pytest.approx(1.610279, abs=2e-3)


# -- as a sampler ---------------------------------------------------------------------------------------------------


def law_and_labels(n=4, **settings):
    labels = torch.zeros(n, dtype=torch.int64)
    law = two_class_mixture(4, **settings)
    return law, Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})


def test_no_iterations_is_the_rule_bit_for_bit():
    law, labels = law_and_labels()
    x = torch.randn(4, 4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for rule, plain in (
        (None, CFG(guidance_scale=3.0)),
        ({"name": "apg", "guidance_scale": 6.0, "norm_threshold": 1.0}, APG(guidance_scale=6.0, norm_threshold=1.0)),
    ):
        latents = []
        for guider in (plain, CFGMP(guidance_scale=3.0, rule=rule, iterations=0)):
            scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.3])
            latents.append(sample(law.denoiser(), scheduler, x, labels, guider=guider))
            assert guider.stats()["network_calls"].tolist() == [2, 2, 2]
        assert torch.equal(*latents)


def test_the_published_setting_of_sd35_takes_62_calls():
    """2 N points from 1 to 1e-4, shifted by 3; steps are between every second one."""
    s = torch.linspace(1, 1e-4, 20, dtype=F64)
    grid = (3 * s / (1 + 2 * s))[::2]
    published = [1, 0.9623, 0.9184, 0.8667, 0.8049, 0.7298, 0.6364, 0.5173, 0.3601, 0.1431]
    assert grid.tolist() == pytest.approx(published, abs=5e-5)
    law, labels = law_and_labels()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=grid.tolist())
    guider = CFGMP(iterations=3, tolerance=0.0, reversed_stop=0.05)
    denoiser = law.denoiser()
    sample(denoiser, scheduler, torch.randn(4, 4), labels, guider=guider)
    stats = guider.stats()
    assert stats["network_calls"].tolist() == [8.0] * 7 + [2.0] * 3
    assert stats["network_calls"].sum() == denoiser.calls == 62
    assert stats["applications"].isfinite().sum() == 7 * 4


def test_both_ends_of_the_window():
    law, labels = law_and_labels()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.6, 0.3])
    guider = CFGMP(projection_start=0.05, projection_stop=0.4, iterations=1)
    sample(law.denoiser(), scheduler, torch.randn(4, 4), labels, guider=guider)
    assert guider.stats()["network_calls"].tolist() == [2, 4, 4, 2]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_other_paths_are_followed_through_the_linear_one(kind):
    """Against the published recipe for noise-predicting models, written out: scale, correct, Euler, scale back."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type=kind)
    scheduler.set_timesteps(5)
    path = from_scheduler(scheduler)
    law, labels = law_and_labels(interpolant=path)
    x = torch.randn(4, 4, dtype=F64)
    guider = CFGMP(guidance_scale=1.75, ridge=0.0, projection_stop=0.6, tolerance=0.0, iterations=3)
    got = sample(law.denoiser(kind), scheduler, x, labels, guider=guider)
    assert (guider.stats()["network_calls"] == 8).sum() >= 3

    times = torch.cat((path.time(scheduler.timesteps), torch.zeros(1, dtype=F64)))
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        (a, s), (a_next, s_next) = ((path.alpha(v), path.sigma(v)) for v in (t, t_next))
        tau, tau_next = s / (a + s), s_next / (a_next + s_next)

        def v(z, condition, t=t, a=a, s=s, tau=tau):
            x0 = law.denoise((a + s) * z, t, condition["class_labels"])
            return (z - x0) / tau

        z, h, null = x / (a + s), (tau - tau_next) / 2, labels.null()
        if tau > 0.4:
            past = []
            for _ in range(3):
                y = z + h * v(z, null)
                past = [*past, (z, y - h * v(y, labels) - z)][-2:]
                z = anderson_step(past)
        u = v(z, null)
        z = z + (tau_next - tau) * (u + 1.75 * (v(z, labels) - u))
        x = (a_next + s_next) * z
    torch.testing.assert_close(got.double(), x, rtol=2e-5, atol=2e-5)  # alphas of the scheduler are float32


def test_the_end_of_the_step_must_be_known():
    law, labels = law_and_labels()
    t = torch.tensor(0.8, dtype=F64)
    denoiser = law.denoiser()
    with pytest.raises(ValueError, match=r"needs the time where the step ends \(point.t_next\), got None"):
        CFGMP().guide(Point(denoiser, torch.randn(4, 4), t, None, None, labels), None)
    assert denoiser.calls == 0


# -- three ways -----------------------------------------------------------------------------------------------------

SETTINGS = dict(guidance_scale=3.0, projection_stop=0.8, ridge=0.01, tolerance=0.0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_three_ways_make_the_same_latents(name, tiny_pipeline, run_modular, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    guider = CFGMP(**SETTINGS)
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name)
    calls = run.stats()["network_calls"]
    acted = run.stats()["gap"].isfinite()[:, 0]
    assert acted.sum() >= 2
    # the pipeline's two; the first of four at other places is known already; two where the projection ends
    assert calls.tolist() == [2 + 3 + 2 if a else 2 for a in acted]
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, name), hooked) > 1e-3
    own = own_latents(pipe, name, guider)
    assert guider.stats()["network_calls"].tolist() == [6 if a else 2 for a in acted]
    assert relative(own, hooked) < 1e-5
    if name != "sd15":  # which has no modular pipeline
        assert relative(run_modular(name, guider), hooked) < 1e-5


def test_flux_packed_and_not(tiny_pipeline, run_pipeline, relative):
    pipe, guider = tiny_pipeline("flux"), CFGMP(**SETTINGS)
    with guided(pipe, guider):
        hooked = run_pipeline(pipe, "flux")
    assert relative(own_latents(pipe, "flux", guider), hooked) < 1e-5
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, "flux"), hooked) > 1e-3


def test_saved_and_reloaded_in_a_fresh_process(modular_pipeline, run_pipeline, relative, tmp_path):
    classic, modular = modular_pipeline("sdxl")
    guider = CFGMP(**SETTINGS, rule={"name": "apg", "guidance_scale": 6.0, "norm_threshold": 2.0})
    with guided(classic, guider):
        expected = run_pipeline(classic, "sdxl")
    attach(modular, guider)
    assert relative(run_pipeline(modular, "sdxl"), expected) < 1e-5
    modular.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    code = f"""
    import torch, genkit
    torch.set_num_threads(1)
    from diffusers import ModularPipeline
    from genkit.testing import tiny
    folder = {str(tmp_path)!r}
    pipe = ModularPipeline.from_pretrained(folder + "/modular")
    pipe.load_components()
    settings = lambda: tiny.call_arguments("sdxl", 3) | dict(output_type="latent", negative_prompt="two dogs")
    results = {{"modular": pipe(**settings(), output="latents")}}
    classic = tiny.pipeline("sdxl")
    with genkit.guided(classic, genkit.load_guider(folder + "/modular/guider")):
        results["classic"] = classic(**settings(), guidance_scale=2.0).images
    torch.save(results, folder + "/results.pt")
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    for kind, latents in torch.load(tmp_path / "results.pt", weights_only=True).items():
        assert relative(latents, expected) < 1e-5, kind


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=-1.0), "guidance_scale=-1.0"),
        (dict(iterations=-1), "iterations=-1: accepted is 0 <= iterations"),
        (dict(anderson_window=-1), "anderson_window=-1"),
        (dict(damping=0.0), "damping=0.0: accepted is 0 < damping <= 1"),
        (dict(damping=1.5), "damping=1.5"),
        (dict(ridge=-1e-4), "ridge=-0.0001"),
        (dict(tolerance=-1.0), "tolerance=-1.0"),
        (dict(trust_radius=0.0), "trust_radius=0.0: accepted is 0 < trust_radius"),
        (dict(projection_start=0.5), "projection_stop=0.4: accepted is 0.5 <= projection_stop <= 1"),
        (dict(reversed_stop=2.0), "reversed_stop=2.0"),
        (dict(rule={"name": "agp"}), r"rule\['name'\]='agp' is not known; did you mean 'apg'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CFGMP(**settings)


def test_pipelines_that_cannot_be_corrected(tiny_pipeline, run_pipeline):
    pipe, calls = tiny_pipeline("flux"), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="without true classifier-free guidance"), guided(pipe, CFGMP()):
        run_pipeline(pipe, "flux", true_cfg_scale=1.0)
    distilled = from_pipeline(pipe).encode(pipe, "a cat", max_sequence_length=16)
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.5)
    with pytest.raises(ValueError, match="no unconditional branch"):
        sample(from_pipeline(pipe), pipe.scheduler, torch.randn(1, 4, 16, 16), distilled, guider=CFGMP())
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="CFGMP moves the sample.*HeunDiscreteScheduler remembers"):
        with guided(pipe, CFGMP()):
            pass
    assert not calls
