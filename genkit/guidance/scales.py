"""The field's ways to write a guidance scale, and the way from each to each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from genkit.registry import unknown


@dataclass(frozen=True)
class ScaleForm:
    """A convention: its formula, the value that means no guidance, its range, who writes it so; maps from and to ``w``.

    ``w`` is the scale of ``u + w (c - u)``, which every guider of genkit takes.
    """

    formula: str
    neutral: float
    accepted: Callable[[float], bool]
    range: str
    used_by: str
    to_w: Callable[[float], float]
    from_w: Callable[[float], float]


def _shifted(formula: str, used_by: str) -> ScaleForm:
    return ScaleForm(formula, 0.0, lambda s: s >= -1, "s >= -1", used_by, lambda s: s + 1, lambda w: w - 1)


def _plain(formula: str, used_by: str) -> ScaleForm:
    return ScaleForm(formula, 1.0, lambda s: s >= 0, "s >= 0", used_by, lambda s: s, lambda w: w)


FORMS: dict[str, ScaleForm] = {
    "diffusers": _plain("u + s (c - u)", "genkit, Diffusers, Imagen, DiT, EDM2, Autoguidance, guidance intervals"),
    "original": _shifted(
        "(1 + s) c - s u", "Ho and Salimans, DreamFusion, `use_original_formulation`, perturbed attention guidance"
    ),
    "density": _plain("p_u^(1 - s) p_c^s", "Feynman-Kac correctors; classifier guidance of an unconditional model"),
    "lcm_embedded": _shifted("network(x, t, c, s)", "guidance embedding of LCM UNets: what `timestep_cond` holds"),
    "flux_embedded": _plain("network(x, t, c, s)", "Flux: the `guidance` input, multiplied by 1000 inside"),
    "mean_flow_embedded": ScaleForm(
        "network(x, t, c, s)",
        0.0,
        lambda s: s < 1,
        "s < 1",
        "improved MeanFlow: 1 - 1 / w as a condition",
        lambda s: 1 / (1 - s),
        lambda w: 1 - 1 / w if w else -math.inf,
    ),
}


def convert_guidance_scale(scale: float, source: str, target: str = "diffusers") -> float:
    """``scale`` in the convention ``target`` that guides as much as it does in ``source``; both names of :data:`FORMS`.

    Raises:
        ValueError: an unknown form, a scale outside its form's range, or one that ``target`` has no number for.

    Sources: Ho and Salimans, "Classifier-free diffusion guidance", arXiv 2207.12598, equation 6 (``original``); Luo
    et al., "Latent consistency models", arXiv 2310.04378; Geng et al., "Improved mean flows", arXiv 2512.02012.
    """
    for setting, name in (("source", source), ("target", target)):
        if name not in FORMS:
            raise ValueError(unknown(setting, name, FORMS))
    if not (math.isfinite(scale) and FORMS[source].accepted(scale)):
        raise ValueError(f"scale={scale!r}: {source} accepts {FORMS[source].range}")
    converted = FORMS[target].from_w(FORMS[source].to_w(scale))
    if not math.isfinite(converted):
        raise ValueError(f"scale={scale!r} of {source}: {target} ({FORMS[target].range}) has no such scale")
    return converted


def mean_flow_scale(omega: float, kappa: float) -> float:
    """``w`` that MeanFlow's training with ``omega v_c + kappa u_c + (1 - omega - kappa) u_null`` ends at.

    The fixed point ``u_c`` of that target is the field guided by ``omega / (1 - kappa)``.

    Raises:
        ValueError: ``kappa >= 1`` or a negative ``omega``.

    Source: Geng et al., "Mean flows for one-step generative modeling", arXiv 2505.13447, appendix on guidance.
    """
    if not kappa < 1:
        raise ValueError(f"kappa={kappa!r}: accepted is kappa < 1")
    if not omega >= 0:
        raise ValueError(f"omega={omega!r}: accepted is omega >= 0")
    return omega / (1 - kappa)
