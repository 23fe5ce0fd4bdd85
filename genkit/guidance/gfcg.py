"""Gradient-free classifier guidance."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.guidance.autoguidance import check_weak, weaker
from genkit.guidance.base import Guided, Guider, Point, check_range, within
from genkit.guidance.label_space import LabelSpace
from genkit.interpolants import expand
from genkit.registry import unknown

MODES = ("alone", "cfg_add", "cfg_switch", "autoguidance")
REFERENCES = ("runner_up", "null")
# How confused a classifier is, from the probabilities of the desired and the reference class.
SCALE_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one_minus_desired": lambda desired, reference: 1 - desired,
    "relative_confusion": lambda desired, reference: reference / (reference + desired),
    "constant": lambda desired, reference: torch.ones_like(desired),
}


@dataclass
class Classified:
    """The last classification: probabilities ``p`` ``(B, K)`` (``None`` outside the window), how many times ago, and
    which row of ``desired`` each sample is."""

    rows: Tensor
    t: Tensor | None = None
    age: int = 0
    p: Tensor | None = None

    def gather(self, index) -> "Classified":
        return replace(self, rows=self.rows[index], p=None if self.p is None else self.p[index])


class GFCG(Guider):
    """Gradient-free classifier guidance: away from the class with which the sample is most likely to be confused.

    A classifier looks at the predicted clean sample; no gradient is made. Per sample, with ``D_c`` the prediction for
    the desired class or prompt ``c``::

        p     = softmax(classifier(decode(D_c)) / temperature)
        r     = argmax over k != c of p_k
        scale = 1 + strength (1 - p_c)                          (one_minus_desired)
                1 + strength p_r / (p_r + p_c)                  (relative_confusion)
                1 + strength                                    (constant)
        g     = D_c + (scale - 1) (D_c - D_r)                   (alone)
                the same + (w - 1) (D_c - D_null)               (cfg_add)
                the same, D_null and w in place of D_r and scale where p_c >= tau     (cfg_switch)
                the same, the weaker network's prediction for r in place of D_r       (autoguidance)

    where ``(alpha / sigma^2) (D_c - D_r)`` is the gradient of ``log p(c | x_t) / p(r | x_t)``. Outside the window of
    the classifier, where its answer is not finite, and where there is but one class, ``D_null`` and ``w`` stand in.
    The classifier's confidence in the predicted clean sample is not ``p(c | x_t)``. Costs one prediction more than the
    condition's own (two with ``cfg_add``), a decoding and a classification.

    Source: "Gradient-Free Classifier Guidance for Diffusion Model Sampling", arXiv 2411.15393: the reference class and
    the combinations. The scale rules and the exact form of the combinations are this project's, so no table of the
    paper is claimed to be reproduced.

    Give by :meth:`using`:
        classifier: images ``(B, C, H, W)`` to logits ``(B, K)``, such as
            :class:`genkit.networks.image_classifiers.ImageClassifier`; for prompts ``PromptClassifier``.
        decode: predicted clean samples to what the classifier takes; for latents
            :class:`genkit.networks.latent_decoder.LatentDecoder`.
        candidates: the condition that belongs to each of the classifier's classes, ``K`` rows:
            ``Condition({"class_labels": ids})`` where its numbering is not the network's, or the encoded prompts.
        desired: row of ``candidates`` that each sample is to be, an int or ``(B,)``. Class labels say it themselves.
        weak: the weaker network, as for :class:`genkit.guidance.autoguidance.Autoguidance`.
        scale_rule: ``(p, desired, reference, t) -> (B,)``, a rule of your own for ``scale``.
        choose: ``(p, desired) -> (B,)``, a rule of your own for the reference class.

    Args:
        strength: ``>= 0``; 0 makes ``scale`` 1 under the named rules.
        guidance_scale: ``w >= 1`` of the null condition; 1 does without it.
        scale_rule: ``one_minus_desired``, ``relative_confusion`` or ``constant``.
        reference: ``runner_up``, or ``null`` for the null condition at ``scale``.
        mode: ``alone``, ``cfg_add``, ``cfg_switch`` or ``autoguidance``.
        classify_start, classify_stop: window of the classifier, as positions on the noise axis. Close to noise the
            predicted clean sample is a blurred mean and its class close to arbitrary.
        classify_every: classify at every so many times and keep the answer in between.
        temperature: ``> 0``, of the classifier.
        tau: probability of the desired class from which ``cfg_switch`` turns to CFG.
        start, stop, enabled, scheduler_config: see :class:`Guider`.

    :meth:`stats` has, per evaluation and sample, ``p_desired``, ``reference`` (row of ``candidates``; -1 for null) and
    ``scale``.

    Raises:
        ValueError: a value outside its range; in :meth:`check_network` a classifier with another label space, or one
            that cannot take the decoded samples; a weaker network that does not fit.
    """

    takes = {
        "classifier": "images to logits (B, K)",
        "decode": "predicted clean samples to images",
        "candidates": "the Condition of each of the classifier's K classes",
        "desired": "the row of candidates that each sample is to be",
        "weak": "a weaker network or denoiser",
        "scale_rule": "(p, desired, reference, t) -> scales (B,)",
        "choose": "(p, desired) -> reference classes (B,)",
    }
    needs: tuple[str, ...] = ("classifier",)
    needs_uncond = False

    @register_to_config
    def __init__(
        self,
        *,
        strength: float = 1.0,
        guidance_scale: float = 1.0,
        scale_rule: str = "one_minus_desired",
        reference: str = "runner_up",
        mode: str = "alone",
        classify_start: float = 0.0,
        classify_stop: float = 1.0,
        classify_every: int = 1,
        temperature: float = 1.0,
        tau: float = 0.5,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("strength", strength, 0)
        check_range("guidance_scale", guidance_scale, 1)
        check_range("classify_start", classify_start, 0, 1)
        check_range("classify_stop", classify_stop, classify_start, 1)
        check_range("classify_every", classify_every, 1)
        check_range("temperature", temperature, 0, open_low=True)
        check_range("tau", tau, 0, 1)
        for name, value, accepted in (
            ("scale_rule", scale_rule, SCALE_RULES),
            ("reference", reference, REFERENCES),
            ("mode", mode, MODES),
        ):
            if value not in accepted:
                raise ValueError(unknown(name, value, accepted))
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.strength = strength
        self.guidance_scale = guidance_scale
        self.scale_rule = scale_rule
        self.reference = reference
        self.mode = mode
        self.classify_start, self.classify_stop = classify_start, classify_stop
        self.classify_every = classify_every
        self.temperature = temperature
        self.tau = tau
        self.needs_uncond = guidance_scale != 1 or reference == "null"
        if mode == "autoguidance":
            self.needs = ("classifier", "weak")

    @property
    def neutral(self) -> bool:
        return self.strength == 0 and self.guidance_scale == 1 and self.given("scale_rule") is None

    @property
    def _labels(self) -> LabelSpace:
        return LabelSpace(self.given("candidates"), self.given("desired"))

    # -- before the run -------------------------------------------------------------------------------------------

    def check_network(self, network, interpolant, prediction_type, shape, condition=None):
        if self.neutral or not self._switched_on:
            return
        if self.mode == "autoguidance":
            check_weak(self.given("weak"), network, interpolant, prediction_type)
        weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        x = torch.zeros(1, *shape[1:], dtype=torch.float64 if _is_double(weight) else torch.float32)
        try:
            logits = self._logits(x if weight is None else x.to(_device(network, weight)))
        except Exception as error:  # whatever other people's models raise
            raise ValueError(
                f"decode and classifier cannot take predicted samples of shape {tuple(x.shape)}: {error}"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"classifier returns {got} for 1 image: accepted are logits of shape (1, K)")
        self._labels.check(logits.shape[1], network, shape[0], condition)

    # -- the rule -------------------------------------------------------------------------------------------------

    def initial(self, index: Tensor) -> Classified:
        return Classified(index)

    def guide(self, point: Point, state: Any) -> tuple[Guided, Any]:
        state = self.begun(point, state)
        if not self.active(point.t):
            return super().guide(point, state)
        add = self.mode == "cfg_add" and self.guidance_scale != 1
        conditions = [point.condition, *([point.condition.null()] if add else [])]
        predictions = point.denoiser.many(point.z, point.t, conditions, timestep=point.timestep)
        parts = dict(zip(("cond", "uncond"), predictions, strict=False))
        cond = parts["cond"]
        state = self._classified(cond, point.t, state)
        chosen, scale, null = self._choice(point, state)
        raw = cond.raw
        if add:
            raw = (cond.raw - parts["uncond"].raw).mul_(self.guidance_scale - 1).add_(raw)
        if bool((scale != 1).any()):
            parts["reference"] = reference = self._reference(point, chosen, null)
            push = (cond.raw - reference.raw.to(raw.dtype)).mul_(expand(scale - 1, raw).to(raw.dtype))
            raw = push.add_(raw)
        return Guided(cond.with_raw(raw), parts), state

    def _classified(self, cond: Prediction, t: Tensor, state: Classified) -> Classified:
        """The state at ``t``: solvers that ask twice at one time are given one answer."""
        if state.t is not None and torch.equal(state.t, t):
            return state
        if not within(t, self.classify_start, self.classify_stop):
            return replace(state, t=t, p=None)
        if state.p is not None and state.age + 1 < self.classify_every:
            return replace(state, t=t, age=state.age + 1)
        logits = self._logits(cond.sample)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return replace(state, t=t, age=0, p=(logits.to(wide) / self.temperature).softmax(1))

    def _logits(self, x: Tensor) -> Tensor:
        decode, classifier = self.given("decode"), self.given("classifier")
        with torch.no_grad():
            images = x if decode is None else decode(x)
            weight = next(classifier.parameters(), images) if isinstance(classifier, nn.Module) else images
            return classifier(images.to(weight.dtype))

    def _choice(self, point: Point, state: Classified) -> tuple[Tensor, Tensor, Tensor]:
        """Per sample the reference class, its scale, and whether the null condition takes its place."""
        b, device, w = len(point.z), point.z.device, self.guidance_scale
        fallback = w if self.mode != "cfg_add" else 1.0  # which adds the push of the null condition everywhere
        p, nothing = state.p, torch.zeros(b, dtype=torch.bool, device=device)
        if p is None or p.shape[1] == 1:
            scale = torch.full((b,), fallback, device=device)
            self.note(p_desired=scale * torch.nan, reference=scale * 0 - 1, scale=scale)
            return nothing.long(), scale, ~nothing
        desired = self._labels.rows(point.condition, state.rows)
        choose, rule = self.given("choose") or reference_class, self.given("scale_rule")
        chosen = _checked("choose", choose(p, desired), b).long()
        p_desired, p_chosen = (p.gather(1, k[:, None])[:, 0] for k in (desired, chosen))
        if rule is not None:
            scale = _checked("scale_rule", rule(p, desired, chosen, point.t), b).to(p.dtype)
        else:
            scale = 1 + self.strength * SCALE_RULES[self.scale_rule](p_desired, p_chosen)
        to_cfg = ~(p.isfinite().all(1) & scale.isfinite())
        if self.mode == "cfg_switch":
            to_cfg = to_cfg | (p_desired >= self.tau)
        scale = scale.where(~to_cfg, fallback)
        null = to_cfg & (fallback != 1) | (self.reference == "null") & ~to_cfg
        self.note(p_desired=p_desired, reference=chosen.where(~(null | to_cfg), -1), scale=scale)
        return chosen, scale, null

    def _reference(self, point: Point, chosen: Tensor, null: Tensor) -> Prediction:
        """The prediction to guide away from: under the condition of the ``chosen`` class, or the null condition."""
        denoiser: Denoiser = point.denoiser
        if self.mode == "autoguidance":
            denoiser = weaker(denoiser, self.given("weak"))

        def ask(condition: Condition) -> Prediction:
            return denoiser.many(point.z, point.t, [condition], timestep=point.timestep)[0]

        if bool(null.all()):
            return ask(point.condition.null())
        values = {**point.condition.values, **self._labels.values(chosen)}
        if not bool(null.any()):
            return ask(Condition(values))
        other = point.condition.null().values
        if {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in values.items()}:
            return ask(Condition(values, other).drop(null))
        # Inside a pipeline whose prompts are known by row only, and whose own null prediction costs nothing.
        reference, without = ask(Condition(values)), ask(point.condition.null())
        return reference.with_raw(torch.where(expand(null, reference.raw), without.raw, reference.raw))


def reference_class(p: Tensor, desired: Tensor) -> Tensor:
    """The most probable class ``(B,)`` other than ``desired`` ``(B,)`` under ``p`` ``(B, K)``; of equals the first."""
    return p.scatter(1, desired[:, None], -1).argmax(1)


def _checked(name: str, answer: Tensor, batch: int) -> Tensor:
    if not isinstance(answer, Tensor) or answer.shape != (batch,):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"{name} returned {got}: accepted is a tensor of shape ({batch},)")
    return answer


def _is_double(weight: Tensor | None) -> bool:
    return weight is not None and weight.dtype == torch.float64


def _device(network: nn.Module, weight: Tensor) -> torch.device:
    """Where a network computes, also while its weights wait elsewhere (offloading)."""
    hooks = (getattr(module, "_hf_hook", None) for module in network.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((d for d in devices if d is not None), weight.device)
    return torch.device(device)
