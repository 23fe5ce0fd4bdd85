"""Autoguidance: guidance by a weaker network."""

from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import nn

from genkit.denoisers.base import Denoiser
from genkit.denoisers.network import NetworkDenoiser, adapter_of, unwrap
from genkit.guidance.base import Guider, check_range
from genkit.guidance.captured import CapturedDenoiser
from genkit.guidance.rule import inner_rule
from genkit.interpolants import Interpolant

# What two networks must share so that one can be called with the other's arguments.
_SHARED = (
    "in_channels",
    "cross_attention_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "addition_embed_type",
    "time_cond_proj_dim",
    "guidance_embeds",
    "num_embeds_ada_norm",
    "num_classes",
)


class Autoguidance(Guider):
    """Autoguidance: extrapolate from a weaker network through the one that is sampled.

    With ``D`` and ``D_weak`` the predictions of the two networks at the same point under the same condition, and
    ``w`` the scale::

        g = D_weak + w (D - D_weak)
        g = R + (w - 1) (D - D_weak)        (with a rule, whose answer is R)

    The same in every parametrisation. The weaker network should fail as the stronger one does, only more: smaller,
    trained for less, the same data and conditions. Give it by ``guider.using(weak=network)``: a network of the same
    kind, or a denoiser, of which path and prediction type are compared as well (``from_pipeline(weak_pipe)``).

    Not Diffusers' ``AutoGuidance``, which leaves out layers of one network.

    Source: Karras et al., "Guiding a diffusion model with a bad version of itself", arXiv 2406.02507, equation 3.

    Args:
        guidance_scale: ``w >= 1``.
        rule: a rule over the stronger network's conditional and unconditional predictions, as
            ``{"name": "cfg", "guidance_scale": 3}``; without one, no unconditional prediction is made.
        start, stop, enabled, scheduler_config: see :class:`Guider`.

    Raises:
        ValueError: a value outside its range; in :meth:`check_network` a weaker network that does not fit.
    """

    takes = {"weak": "a weaker network or denoiser"}
    needs = ("weak",)

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 2.0,
        rule: dict | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("guidance_scale", guidance_scale, 1)
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.guidance_scale = guidance_scale
        self.rule = rule
        self.hold(inner_rule(rule, 1.0))  # at scale 1: the conditional prediction

    @property
    def neutral(self) -> bool:
        return self.guidance_scale == 1 and self.inner.neutral

    def check_network(self, network, interpolant, prediction_type, shape, condition=None):
        super().check_network(network, interpolant, prediction_type, shape, condition)
        check_weak(self.given("weak"), network, interpolant, prediction_type)

    def guide(self, point, state):
        state = self.begun(point, state)
        if not self.active(point.t):
            return super().guide(point, state)
        guided, state = self.inner.guide(point, state)
        if self.guidance_scale == 1:
            return guided, state
        here = point if guided.z is None else replace(point, z=guided.z)
        strong = guided.parts.get("cond")
        if strong is None or strong.z is not here.z:
            (strong,) = point.denoiser.many(here.z, point.t, [point.condition], timestep=point.timestep)
        (weak,) = weaker(point.denoiser, self.given("weak")).many(
            here.z, point.t, [point.condition], timestep=point.timestep
        )
        push = (strong.raw - weak.raw.to(strong.raw.dtype)).mul_(self.guidance_scale - 1)
        prediction = guided.prediction.with_raw(push.add_(guided.prediction.raw))
        return replace(guided, prediction=prediction, parts=guided.parts | {"weak": weak}), state


def weaker(denoiser: Denoiser, weak) -> Denoiser:
    """The denoiser around ``weak``, which passed :func:`check_weak`; its calls are counted with ``denoiser``'s."""
    if isinstance(denoiser, CapturedDenoiser) and isinstance(weak, NetworkDenoiser):
        weak = weak.network  # which is called as the pipeline calls its own
    return denoiser.with_network(weak)


def check_weak(weak, network, interpolant: Interpolant, prediction_type: str) -> None:
    """Refuse a weaker model that cannot answer where the guided one does, as far as their configurations tell.

    Args:
        weak: a network or a denoiser.
        network, interpolant, prediction_type: of the guided model.

    Raises:
        ValueError: another path, prediction type or kind of network, or samples or conditions of another shape.
    """
    name = type(weak).__name__
    if isinstance(weak, Denoiser):
        if not weak.interpolant.same_as(interpolant):
            raise ValueError(
                f"weak={name} on the path {type(weak.interpolant).__name__}: accepted is the path of the guided model, "
                f"{type(interpolant).__name__}, with the same alpha and sigma"
            )
        if weak.prediction_type != prediction_type:
            raise ValueError(
                f"weak={name} with prediction_type={weak.prediction_type!r}: accepted is that of the guided model, "
                f"{prediction_type!r}"
            )
        weak = weak.network
    elif not callable(weak) or hasattr(weak, "components"):
        raise ValueError(
            f"weak={name}: accepted is a network or a denoiser; for a pipeline, genkit.denoisers.from_pipeline(pipe)"
        )
    kind = adapter_of(network) if isinstance(network, nn.Module) else None
    if kind is None:
        return
    if not isinstance(weak, nn.Module) or adapter_of(weak) is not kind:
        raise ValueError(
            f"weak={name}: accepted is a network of the kind of the guided one, {type(unwrap(network)).__name__}"
        )
    one: Any = unwrap(network).config
    other: Any = unwrap(weak).config
    # Networks of classes have positions for one size of samples.
    fixed = ("sample_size",) if one.get("num_classes") or one.get("num_embeds_ada_norm") else ()
    for key in (*_SHARED, *fixed):
        if one.get(key) != other.get(key):
            raise ValueError(
                f"weak={name} with {key}={other.get(key)!r}: accepted is that of the guided network, {one.get(key)!r}"
            )
