"""The arithmetic of a guidance step, compiled: what eager code gives, and one program whatever the scale and time."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from genkit import kernels
from genkit.denoisers.base import Prediction
from genkit.guidance import APG, CFG
from genkit.interpolants import Linear

RULES = {
    "cfg": lambda w: CFG(guidance_scale=w),
    "cfg_rescaled": lambda w: CFG(guidance_scale=w, guidance_rescale=0.7),
    "apg": lambda w: APG(guidance_scale=w, eta=0.5, norm_threshold=2.0, momentum=-0.5),
    "apg_diffusers": lambda w: APG(guidance_scale=w, momentum=-0.25, formulation="diffusers"),
}
SHAPE = (3, 4, 8, 8)  # 256 elements a sample: the fast inner product


@pytest.fixture
def programs():
    """How many were compiled since."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@torch.no_grad()
def run(guider, shape, dtype=torch.float32):
    """Five evaluations of a run; what is followed at each, and the diagnostics."""
    draw = torch.Generator().manual_seed(0)
    state, followed = None, []
    guider.start_run()
    for t in torch.linspace(0.9, 0.1, 5, dtype=torch.float64):
        z, c, u = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
        parts = {n: Prediction(raw, "flow_prediction", Linear(), z, t) for n, raw in (("cond", c), ("uncond", u))}
        guided, state = guider.combine(parts, state)
        followed.append(guided.raw)
    return torch.stack(followed), guider._all_notes()


def agree(guider, shape, dtype, tolerance):
    with kernels.choose("off"):
        wanted, wanted_notes = run(guider, shape, dtype)
    with kernels.choose("on"):
        found, notes = run(guider, shape, dtype)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    assert notes.keys() == wanted_notes.keys()
    for name, value in notes.items():
        torch.testing.assert_close(value, wanted_notes[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_one_program_for_all_times_and_scales(rule, programs, monkeypatch):
    """APG has another at the first time, where no momentum is kept."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: real(f, backend="aot_eager", **settings))
    fresh(monkeypatch)
    for scale in (3.0, 5.0, 7.5):
        agree(RULES[rule](scale), SHAPE, torch.float32, 1e-5)
    assert programs() == (1 if rule.startswith("cfg") else 2)
    agree(RULES[rule](3.0), (2, 4, 5, 7), torch.bfloat16, 8e-3)
    assert programs() == 2 * (1 if rule.startswith("cfg") else 2)


def fresh(monkeypatch):
    """Functions that have not been compiled yet."""
    from genkit.guidance import arithmetic

    for name in ("cfg", "apg"):
        function = getattr(arithmetic, name).__wrapped__
        monkeypatch.setattr(arithmetic, name, arithmetic.compilable(function))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="nothing to compile with")
@pytest.mark.parametrize("rule", ["cfg_rescaled", "apg"])
def test_compiled_for_this_machine(rule, programs, monkeypatch):
    fresh(monkeypatch)
    agree(RULES[rule](5.0), SHAPE, torch.float32, 1e-5)
    assert programs()


def test_eager_unless_demanded(monkeypatch):
    """Compiling takes longer than a run's steps take."""
    fresh(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    for how in ("auto", "off"):
        with kernels.choose(how):
            for rule in RULES.values():
                run(rule(5.0), SHAPE)
