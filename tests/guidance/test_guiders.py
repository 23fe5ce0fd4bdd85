"""What every guider keeps, whoever wrote it: each file of genkit/guidance is found and tested here."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

import genkit
from genkit.denoisers.base import Condition, Prediction
from genkit.denoisers.function import FunctionDenoiser
from genkit.guidance import APG, CFG, Guider, Point, load_guider
from genkit.interpolants import Linear, from_scheduler
from genkit.sampling import sample
from tests.ready import ACTS_ALONE, GUIDERS, SCALE, name_of, ready

every_guider = pytest.mark.parametrize("cls", GUIDERS.values(), ids=GUIDERS)
TIMES = [0.9, 0.6, 0.3]


def field(same=False, dtype=torch.float64):
    """A smooth nonlinear velocity whose condition is a shift per sample, by a network of ``dtype``."""
    weight = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def velocity(x, t, shift):
        return torch.tanh(x.double() @ weight + t[:, None] + (0 if same else shift)).to(dtype)

    return FunctionDenoiser(velocity, Linear(), "flow_prediction")


def condition(batch=4):
    shift = torch.randn(batch, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Condition({"shift": shift}, {"shift": torch.zeros_like(shift)})


def walk(guider, denoiser, x, condition):
    """The raw guided predictions along an Euler walk."""
    state, raws = None, []
    for t in TIMES:
        t = torch.tensor(t, dtype=torch.float64)
        guided, state = guider.guide(Point(denoiser, x, t, t - 0.3, None, condition), state)
        raws.append(guided.prediction.raw)
        x = ((x if guided.z is None else guided.z) - 0.3 * guided.prediction.velocity).to(x.dtype)
    return torch.stack(raws), state


def noise(batch=4):
    return torch.randn(batch, 12, dtype=torch.float64)


def make(cls, **settings):
    return ready(cls, (4, 12), **settings)


def test_the_first_two_are_found():
    assert GUIDERS["cfg"] is CFG and GUIDERS["apg"] is APG
    assert genkit.load_guider is load_guider


@every_guider
def test_scale_one_disabled_and_out_of_window_follow_the_condition_in_one_call(cls):
    x, cond = noise(), condition()
    plain, _ = walk(CFG(enabled=False), field(), x, cond)
    for settings in (dict(guidance_scale=1), dict(enabled=False), dict(start=0.95), dict(stop=0.05)):
        guider, denoiser = make(cls, **settings), field()
        if "guidance_scale" in settings and not guider.neutral:  # a rule that does more than scale
            continue
        raws, _ = walk(guider, denoiser, x, cond)
        assert torch.equal(raws, plain)
        assert denoiser.calls == len(TIMES)


@every_guider
def test_equal_predictions_are_kept_halfway(cls):
    """At the ends a rule may do something else than combine (zero-init)."""
    if name_of(cls) in ACTS_ALONE:
        pytest.skip("does something beside combining the two")
    denoiser, x, cond = field(same=True), noise(), condition()
    point = Point(denoiser, x, torch.tensor(0.5, dtype=torch.float64), None, None, cond)
    guider = make(cls)
    if "weak" in cls.takes:  # here the network itself stands for the weaker one
        guider = guider.using(weak=denoiser)
    guided, _ = guider.guide(point, None)
    plain, _ = CFG(enabled=False).guide(point, None)
    torch.testing.assert_close(guided.prediction.raw, plain.prediction.raw)


@every_guider
def test_the_push_grows_with_the_scale_away_from_the_other_prediction(cls):
    """So that no rule guides towards what it is to guide away from."""
    setting = SCALE.get(name_of(cls), "guidance_scale")
    if setting is None or setting not in cls().config:
        pytest.skip("has no scale")
    point = Point(field(), noise(), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.4), None, condition())
    lower, higher = (make(cls, **{setting: w}).guide(point, None)[0] for w in (1.1, 1.2))
    (other,) = (part for name, part in higher.parts.items() if name != "cond")
    growth = higher.prediction.raw - lower.prediction.raw
    assert ((growth * (higher.parts["cond"].raw - other.raw)).sum(1) > 0).all()


@every_guider
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_followed_has_the_dtype_of_the_network(cls, dtype):
    guider, x, cond = make(cls), noise().to(dtype), condition()
    for denoiser in (field(dtype=dtype), field(same=True, dtype=dtype)):
        raws, _ = walk(guider, denoiser, x, cond)
        assert raws.dtype == dtype and raws.isfinite().all()


@every_guider
def test_a_sample_does_not_depend_on_its_neighbours(cls):
    x, cond, order = noise(), condition(), torch.tensor([2, 0, 3])
    together, _ = walk(make(cls), field(), x, cond)
    permuted, _ = walk(make(cls, rows=order), field(), x[order], cond.index(order))
    torch.testing.assert_close(permuted, together[:, order], rtol=1e-12, atol=1e-12)


@every_guider
def test_pure_given_its_state(cls):
    guider, x, cond = make(cls), noise(), condition()
    assert torch.equal(walk(guider, field(), x, cond)[0], walk(guider, field(), x, cond)[0])


@every_guider
def test_state_can_be_gathered(cls):
    guider, denoiser, x, cond, index = make(cls), field(), noise(), condition(), torch.tensor([3, 3, 1])
    _, state = walk(guider, denoiser, x, cond)
    t = torch.tensor(0.1, dtype=torch.float64)
    full, _ = guider.guide(Point(denoiser, x, t, None, None, cond), state)
    gathered = None if state is None else state.gather(index)
    part, _ = guider.guide(Point(denoiser, x[index], t, None, None, cond.index(index)), gathered)
    torch.testing.assert_close(part.prediction.raw, full.prediction.raw[index], rtol=1e-12, atol=1e-12)


@every_guider
def test_the_rule_does_something(cls):
    x, cond = noise(), condition()
    assert (
        walk(make(cls), field(), x, cond)[0] - walk(make(cls, enabled=False), field(), x, cond)[0]
    ).abs().max() > 1e-2


@every_guider
def test_survives_json_new_and_load(cls, tmp_path):
    guider = cls(start=0.125, stop=0.75)
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    for copy in (guider.new(), load_guider(tmp_path), cls.from_pretrained(tmp_path)):
        assert type(copy) is cls
        settings = {k: v for k, v in guider.config.items() if not k.startswith("_")}
        assert {k: copy.config[k] for k in settings} == settings
        assert (copy.start, copy.stop) == (0.125, 0.75)


@every_guider
def test_arguments_are_keyword_only_and_attributes_fixed(cls):
    with pytest.raises(TypeError, match="positional"):
        cls(3.0)
    guider = cls(start=0.25)
    with pytest.raises(AttributeError, match=r"use guider\.new\(start=0\.5\)"):
        guider.start = 0.5
    assert guider.new(start=0.5).start == 0.5 and guider.start == 0.25


@every_guider
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(start=-0.1), "start=-0.1: accepted is 0 <= start < 1"),
        (dict(start=1.0), "start=1.0"),
        (dict(start=0.6, stop=0.5), "stop=0.5: accepted is 0.6 <= stop <= 1"),
        (dict(stop=1.5), "stop=1.5"),
    ],
)
def test_bad_windows(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@every_guider
def test_the_loader_finds_the_base_class_in_the_module(cls):
    import sys

    assert hasattr(sys.modules[cls.__module__], "BaseGuidance")


@every_guider
def test_stats_and_calls(cls):
    guider, denoiser, x, cond = make(cls), field(), noise(), condition()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=TIMES)
    sample(denoiser, scheduler, x, cond, guider=guider)
    stats = guider.stats()
    assert stats["network_calls"].sum() == denoiser.calls > len(TIMES)
    torch.testing.assert_close(stats["t"], torch.tensor(TIMES, dtype=torch.float64), rtol=1e-6, atol=0)
    assert all(v.shape in ((3,), (3, 4)) for v in stats.values())
    scheduler.set_timesteps(sigmas=TIMES)
    sample(denoiser, scheduler, x, cond, guider=guider)
    assert len(guider.stats()["t"]) == 3  # a run begins anew
    assert guider.new().stats() == {}


@every_guider
def test_what_it_needs_is_missed_before_the_first_call(cls):
    denoiser = field()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=TIMES)
    for name in cls.needs:
        guider = make(cls)
        del guider._given[name]
        with pytest.raises(ValueError, match=rf"lacks '{name}' .*using\({name}=\.\.\.\)"):
            sample(denoiser, scheduler, noise(), condition(), guider=guider)
    with pytest.raises(ValueError, match="name='nothing' is not known"):
        cls().using(nothing=1)
    if make(cls).needs_uncond:
        with pytest.raises(ValueError, match="null_values=None"):
            sample(denoiser, scheduler, noise(), Condition({"shift": noise()}), guider=make(cls))
    assert denoiser.calls == 0


def test_no_unconditional_branch():
    with pytest.raises(ValueError, match="null_values=None"):
        walk(CFG(), field(), noise(), Condition({"shift": noise()}))


@pytest.mark.parametrize(
    ("start", "stop", "guided"), [(0, 1, "111"), (0.2, 0.5, "010"), (0, 0.1, "100"), (0.7, 1, "001")]
)
def test_window_is_a_range_of_the_noise_axis(start, stop, guided):
    guider = CFG(start=start, stop=stop)
    assert "".join(str(int(guider.active(torch.tensor(t)))) for t in TIMES) == guided


def test_a_window_to_the_end_has_no_gap_at_either_end():
    path = from_scheduler(DDIMScheduler())
    ends = path.time(torch.tensor([999, 0, -1]))
    assert all(CFG(start=0, stop=1).active(t) for t in ends)
    assert CFG().active(torch.tensor(1.0 + 1e-9))


def test_cfg_rescale_matches_diffusers():
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    cond, uncond, z = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64)
    where = ("epsilon", Linear(), z, torch.tensor(0.5, dtype=torch.float64))
    parts = {"cond": Prediction(cond, *where), "uncond": Prediction(uncond, *where)}
    guided, _ = CFG(guidance_scale=6.0, guidance_rescale=0.7).combine(parts, None)
    expected = rescale_noise_cfg(uncond + 6 * (cond - uncond), cond, 0.7)
    torch.testing.assert_close(guided.raw, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=-1), "guidance_scale=-1"),
        (dict(guidance_rescale=1.5), "guidance_rescale=1.5: accepted is 0"),
    ],
)
def test_cfg_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CFG(**settings)


def test_load_guider_refuses_what_it_does_not_know(tmp_path):
    from diffusers import ClassifierFreeGuidance

    ClassifierFreeGuidance(guidance_scale=3.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'ClassifierFreeGuidance' is not known.*Accepted: .*APG.*CFG"):
        load_guider(tmp_path)
    with pytest.raises(OSError):
        load_guider(tmp_path / "nothing")
    (tmp_path / "guider_config.json").write_text('{"_class_name": "CFG", "guid')
    with pytest.raises(OSError, match="not a valid JSON"):
        load_guider(tmp_path)


def test_a_guider_is_one_short_class():
    class Halfway(Guider):
        @register_to_config
        def __init__(self, *, weight=0.5, start=0.0, stop=1.0, enabled=True, scheduler_config=None):
            super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
            self.weight = weight

        def combine(self, parts, state):
            return parts["cond"].with_raw(torch.lerp(parts["uncond"].raw, parts["cond"].raw, self.weight)), state

    x, cond = noise(), condition()
    assert torch.allclose(walk(Halfway(), field(), x, cond)[0], walk(CFG(guidance_scale=0.5), field(), x, cond)[0])
    with pytest.raises(NotImplementedError, match="neither combine nor guide"):
        walk(type("Empty", (Guider,), {})(), field(), x, cond)


def test_bind_keeps_the_path_of_the_scheduler():
    for scheduler in (DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        guider = CFG(guidance_scale=3.0).bind(scheduler)
        json.dumps(guider.scheduler_config)
        path, kind = guider.new()._path
        assert type(path) is type(from_scheduler(scheduler))
        assert kind == ("v_prediction" if isinstance(scheduler, DDIMScheduler) else "flow_prediction")
        assert guider.guidance_scale == 3.0
    with pytest.raises(ValueError, match="AutoencoderKL has no interpolant"):
        CFG().bind(AutoencoderKL())
