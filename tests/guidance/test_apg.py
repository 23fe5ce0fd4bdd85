"""Every value that methods on adaptive projected guidance were computed to give, in float64."""

import pytest
import torch

from genkit.denoisers.base import Condition, Prediction
from genkit.denoisers.function import FunctionDenoiser
from genkit.guidance import APG, CFG, Point
from genkit.interpolants import DiscreteVP, Linear, Trigonometric
from genkit.testing.oracles import two_class_mixture

PLAIN = dict(eta=0.0, norm_threshold=0.0, momentum=0.0)


def prediction(raw, kind="sample", z=None, t=0.6, path=None):
    raw = torch.as_tensor(raw, dtype=torch.float64)
    z = torch.zeros_like(raw) if z is None else z
    return Prediction(raw, kind, path or Linear(), z, torch.tensor(t, dtype=torch.float64))


def combine(guider, cond, uncond, state=None, **where):
    guided, state = guider.combine({"cond": prediction(cond, **where), "uncond": prediction(uncond, **where)}, state)
    return guided.sample, state


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(eta=0.0), (2.36, 4.48)),
        (dict(eta=0.0, norm_threshold=1.0), (2.8224959, 4.1331280)),
        (dict(eta=1.0, norm_threshold=1.0), (5.2188008, 7.3282012)),
        (dict(eta=0.5), (6.68, 10.24)),
        (dict(eta=0.0, formulation="diffusers"), (0.20, 1.60)),
        (dict(eta=0.0, formulation="comfyui"), (2.20, 4.60)),
    ],
)
def test_published_vectors(settings, expected):
    guider = APG(guidance_scale=5.0, **PLAIN | settings)
    guided, _ = combine(guider, [[3.0, 4.0]], [[1.0, 1.0]])
    torch.testing.assert_close(guided, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=5e-8)


def test_momentum():
    guider = APG(guidance_scale=5.0, **PLAIN | dict(momentum=-0.5))
    _, state = combine(guider, [[3.0, 4.0]], [[1.0, 1.0]], t=0.9)
    guided, state = combine(guider, [[2.0, 0.0]], [[1.0, 0.0]], state, t=0.6)
    torch.testing.assert_close(state.after, torch.tensor([[0.0, -1.5]], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(guided, torch.tensor([[2.0, -6.0]], dtype=torch.float64), rtol=0, atol=1e-12)


def test_momentum_advances_once_per_time():
    guider = APG(guidance_scale=5.0, **PLAIN | dict(momentum=-0.5))
    cond, uncond = torch.randn(2, 3, 8, dtype=torch.float64)
    _, first = combine(guider, cond, uncond, t=0.9)
    _, once = combine(guider, uncond, cond, first, t=0.6)
    _, twice = combine(guider, cond, uncond, once, t=0.6)  # a second stage at the same time
    assert torch.equal(twice.after, (cond - uncond) - 0.5 * first.after)
    again = once.gather(torch.tensor([2, 0]))
    assert torch.equal(again.after, once.after[[2, 0]]) and torch.equal(again.before, once.before[[2, 0]])


def test_pythagoras_without_the_parallel_part():
    cond, uncond = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    guided, _ = combine(APG(guidance_scale=5.0, **PLAIN), cond, uncond)
    d = (cond - uncond).flatten(1)
    c = cond.flatten(1)
    orth = d - (d * c).sum(1, keepdim=True) / (c * c).sum(1, keepdim=True) * c
    expected = c.square().sum(1) + 16 * orth.square().sum(1)
    torch.testing.assert_close(guided.flatten(1).square().sum(1), expected, rtol=1e-13, atol=0)


PATHS = {
    "linear": (Linear(), 0.6),
    "trigonometric": (Trigonometric(), 0.59),
    "alphas_cumprod": (DiscreteVP(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)), 0.64),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_the_guided_sample_does_not_depend_on_the_parametrisation(path, kind):
    path, t = PATHS[path]
    z, cond, uncond = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    guider = APG(guidance_scale=5.0, norm_threshold=3.0, momentum=-0.5)
    expected, _ = combine(guider, cond, uncond, z=z, t=t, path=path)
    time = torch.tensor(t, dtype=torch.float64)
    cond, uncond = (path.convert(d, "sample", kind, z, time) for d in (cond, uncond))
    guided, _ = combine(guider, cond, uncond, kind=kind, z=z, t=t, path=path)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-12)
    raw, _ = combine(guider.new(formulation="diffusers"), cond, uncond, kind=kind, z=z, t=t, path=path)
    assert (raw - expected).abs().max() > 1  # the space is part of the definition


def test_neutral_settings_are_cfg_bit_for_bit():
    cond, uncond = torch.randn(2, 2, 3, 4, 4)
    parts = {"cond": prediction(cond), "uncond": prediction(uncond)}
    apg, _ = APG(guidance_scale=7.5, eta=1.0, norm_threshold=0.0, momentum=0.0).combine(parts, None)
    cfg, _ = CFG(guidance_scale=7.5).combine(parts, None)
    assert torch.equal(apg.raw, cfg.raw)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 3, 8, 8), (2, 16, 8)])
def test_formulation_diffusers_is_that_of_diffusers(shape, eta):
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    guider = APG(guidance_scale=6.0, eta=eta, norm_threshold=9.0, momentum=-0.5, formulation="diffusers")
    buffer, state = MomentumBuffer(-0.5), None
    for t in (0.9, 0.5, 0.1):
        cond, uncond = torch.randn(2, *shape, dtype=torch.float64)
        expected = normalized_guidance(cond, uncond, 6.0, buffer, eta, 9.0)
        where = dict(kind="epsilon", t=t)
        parts = {"cond": prediction(cond, **where), "uncond": prediction(uncond, **where)}
        guided, state = guider.combine(parts, state)
        torch.testing.assert_close(guided.raw, expected, rtol=1e-12, atol=1e-12)


def test_scaling():
    cond, uncond = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    small, _ = combine(APG(guidance_scale=5.0, norm_threshold=2.0), cond, uncond)
    large, _ = combine(APG(guidance_scale=5.0, norm_threshold=6.0), 3 * cond, 3 * uncond)
    torch.testing.assert_close(large, 3 * small, rtol=1e-13, atol=1e-13)


def test_zero_norms():
    zero, some = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    guider = APG(guidance_scale=3.0, norm_threshold=1.0, momentum=0.0)
    guided, _ = combine(guider, zero, some)  # nothing to project on: all of the push is kept
    torch.testing.assert_close(guided, -2 * some / 2)
    assert torch.equal(combine(guider, zero, zero)[0], zero)
    tiny = 1e-20 * some
    guided, _ = combine(APG(guidance_scale=3.0, eta=1.0, norm_threshold=1.0, momentum=0.0), tiny, zero)
    torch.testing.assert_close(guided, 3 * tiny, rtol=1e-12, atol=0)


def test_at_the_data_the_conditional_prediction_is_kept():
    cond, uncond = torch.randn(2, 2, 4, dtype=torch.float64)
    parts = {k: prediction(v, "flow_prediction", t=0.0) for k, v in (("cond", cond), ("uncond", uncond))}
    assert torch.equal(APG().combine(parts, None)[0].raw, cond)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_drops_the_push(dtype):
    t = torch.tensor(0.5, dtype=torch.float64)
    cond = torch.full((1, 4, 128, 128), 2.0, dtype=dtype)
    cond[:, 0] = -2.0
    uncond = torch.ones(1, 4, 128, 128, dtype=dtype)
    parts = {
        k: Prediction(v, "flow_prediction", Linear(), torch.zeros_like(v), t)
        for k, v in zip(("cond", "uncond"), (cond, uncond), strict=True)
    }
    guider = APG(guidance_scale=4.0, norm_threshold=50.0)
    guided, _ = guider.combine(parts, None)
    wide = {k: Prediction(p.raw.double(), "flow_prediction", Linear(), p.z.double(), t) for k, p in parts.items()}
    expected, _ = guider.combine(wide, None)
    assert guided.raw.dtype == dtype and not torch.equal(guided.raw, cond)
    torch.testing.assert_close(guided.raw.double(), expected.raw, rtol=1e-2, atol=1e-2)


def test_video_is_normalised_frame_by_frame():
    cond, uncond = torch.randn(2, 2, 4, 3, 8, 8, dtype=torch.float64)
    guider = APG(guidance_scale=5.0, norm_threshold=4.0, momentum=0.0)
    guided, _ = combine(guider, cond, uncond)
    for frame in range(3):
        alone, _ = combine(guider, cond[:, :, frame], uncond[:, :, frame])
        torch.testing.assert_close(guided[:, :, frame], alone, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(guided, combine(guider.new(dims=[1, 2, 3, 4]), cond, uncond)[0])


def test_stats():
    cond, uncond = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [6.0, 4.0]])
    denoiser = FunctionDenoiser(lambda x, t, value: value, Linear(), "sample")
    condition = Condition({"value": cond}, {"value": uncond})
    guider, t = APG(norm_threshold=4.0), torch.tensor(0.6, dtype=torch.float64)
    guider.evaluate(Point(denoiser, torch.zeros(2, 2), t, None, None, condition), None)
    stats = guider.stats()
    torch.testing.assert_close(stats["norm"], torch.tensor([[5.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(stats["cosine"], torch.tensor([[1.0, -0.6]], dtype=torch.float64))
    assert stats["capped"].tolist() == [[1.0, 0.0]] and stats["network_calls"].tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=0.5), "guidance_scale=0.5: accepted is 1 <= guidance_scale"),
        (dict(eta=-0.1), "eta=-0.1: accepted is 0 <= eta"),
        (dict(norm_threshold=-1), "norm_threshold=-1"),
        (dict(momentum=0.5), "momentum=0.5: accepted is -1 < momentum <= 0"),
        (dict(momentum=-1), "momentum=-1"),
        (dict(formulation="papre"), "formulation='papre' is not known; did you mean 'paper'"),
        (dict(dims=[0, 1]), r"dims=\[0, 1\]"),
        (dict(dims=[]), r"dims=\[\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        APG(**settings)


MIXTURE = {  # mean and standard deviation of 4000 guided samples of class 0; the truth is .5 and .5
    "conditional": (CFG(guidance_scale=1.0), 0.499, 0.498),
    "cfg": (CFG(guidance_scale=6.0), 0.734, 0.487),
    "projected": (APG(guidance_scale=6.0, **PLAIN), 0.512, 0.431),
    "capped": (APG(guidance_scale=6.0, **PLAIN | dict(norm_threshold=0.5)), 0.509, 0.464),
    "slowed": (APG(guidance_scale=6.0, **PLAIN | dict(norm_threshold=0.5, momentum=-0.5)), 0.507, 0.468),
}


@pytest.mark.parametrize("name", MIXTURE)
def test_mixture_of_two_classes(name):
    guider, mean, std = MIXTURE[name]
    denoiser = two_class_mixture().denoiser()
    labels = torch.zeros(4000, dtype=torch.int64)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 2})
    x = torch.randn(4000, 16, dtype=torch.float64)
    times, state = torch.linspace(1, 0, 201, dtype=torch.float64), None
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        guided, state = guider.guide(Point(denoiser, x, t, t_next, None, condition), state)
        x = x + (t_next - t) * guided.prediction.velocity
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.std(dim=0).mean().item() == pytest.approx(std, abs=0.01)
