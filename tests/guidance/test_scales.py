"""Conversions between conventions of the guidance scale, by what the formulas return."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)

from genkit.guidance.scales import FORMS, convert_guidance_scale, mean_flow_scale

C, U = torch.tensor([1.5, -2.0], dtype=torch.float64), torch.tensor([0.25, 3.0], dtype=torch.float64)
FORMULAS = {
    "diffusers": lambda s: U + s * (C - U),
    "original": lambda s: (1 + s) * C - s * U,
    "density": lambda s: (1 - s) * U + s * C,  # the score of the product of powers
}


@pytest.mark.parametrize("w", [0.0, 0.7, 1.0, 7.5])
@pytest.mark.parametrize("form", FORMULAS)
def test_converted_scales_give_the_same_prediction(form, w):
    torch.testing.assert_close(
        FORMULAS[form](convert_guidance_scale(w, "diffusers", form)), FORMULAS["diffusers"](w), atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_round_trips_and_neutral_values(source, target):
    for w in (0.5, 1.0, 6.5):
        scale = convert_guidance_scale(w, "diffusers", source)
        there = convert_guidance_scale(scale, source, target)
        assert convert_guidance_scale(there, target, source) == pytest.approx(scale, abs=1e-14)
    assert convert_guidance_scale(FORMS[source].neutral, source, target) == FORMS[target].neutral


def test_the_original_form_is_that_of_diffusers_guider():
    cond, uncond = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.ClassifierFreeGuidance(
        guidance_scale=convert_guidance_scale(7.5, "diffusers", "original"), use_original_formulation=True
    )
    theirs.set_state(0, 10, torch.tensor(999))
    torch.testing.assert_close(theirs.forward(cond, uncond).pred, uncond + 7.5 * (cond - uncond))


def test_lcm_pipelines_embed_what_the_form_says():
    """The pipeline embeds its ``guidance_scale`` less one, times 1000, by sines of a half and cosines of the rest."""
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    scale = torch.tensor([convert_guidance_scale(8.5, "diffusers", "lcm_embedded")])
    at_zero = embed(None, torch.tensor([convert_guidance_scale(1.0, "diffusers", "lcm_embedded")]), 4)
    assert scale == 7.5
    torch.testing.assert_close(at_zero, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_mean_flow_fixed_point():
    """Iterate the training target ``u <- omega v_c + kappa u + (1 - omega - kappa) u_null`` to its fixed point."""
    omega, kappa, u = 0.2, 0.92, C
    for _ in range(600):
        u = omega * C + kappa * u + (1 - omega - kappa) * U
    torch.testing.assert_close(u, FORMULAS["diffusers"](mean_flow_scale(omega, kappa)), atol=1e-12, rtol=0)
    assert mean_flow_scale(omega, kappa) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, "paper"), "source='paper'"),
        ((1.0, "original", "nvidia"), "target='nvidia'"),
        ((-0.5, "diffusers"), "scale=-0.5: diffusers accepts s >= 0"),
        ((1.0, "mean_flow_embedded"), "mean_flow_embedded accepts s < 1"),
        ((float("nan"), "original"), "scale=nan"),
        ((0.0, "diffusers", "mean_flow_embedded"), "has no such scale"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_guidance_scale(*arguments)


@pytest.mark.parametrize(("omega", "kappa", "message"), [(1.0, 1.0, "kappa=1.0"), (-1.0, 0.0, "omega=-1.0")])
def test_bad_mean_flow_scales(omega, kappa, message):
    with pytest.raises(ValueError, match=message):
        mean_flow_scale(omega, kappa)


def test_the_table_of_the_readme_is_the_code():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name, form in FORMS.items():
        at_w = convert_guidance_scale(7.5, "diffusers", name)
        row = f"| `{name}` | `{form.formula}` | {form.neutral:g} | {at_w:.4g} | {form.used_by} |"
        assert row in readme, f"README.md lacks the row\n{row}"
