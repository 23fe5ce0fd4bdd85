"""Readout guidance."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genkit.denoisers.base import Condition, Denoiser
from genkit.denoisers.network import unwrap
from genkit.guidance.base import Guided, Guider, Point, check_range
from genkit.guidance.readout_targets import (
    AppearanceTarget,
    CorrespondenceTarget,
    ReferenceTarget,
    SpatialTarget,
    Target,
)
from genkit.guidance.rows import Rows
from genkit.guidance.rule import inner_rule
from genkit.interpolants import expand
from genkit.networks.readout_head import Captured, capture
from genkit.registry import unknown

__all__ = ["AppearanceTarget", "CorrespondenceTarget", "Readout", "SpatialTarget"]

UPDATES = ("adam_sign", "gradient", "normalised")
BRANCHES = ("both", "conditional")


class Readout(Guider):
    """Readout guidance: move the sample so that heads on the network's features read what is wanted.

    With ``L(z)`` the sum over targets of weight times loss, and over the branches, ``g`` its gradient::

        adam_sign     z <- z - step_size g / (|g| + 1e-8)     (one step of a fresh Adam: a sign step)
        gradient      z <- z - step_size g
        normalised    z <- z - step_size g / rms(g)           (rms per sample)

    ``inner_steps`` times where ``readout_start <= 1 - t < readout_stop``; then the combination rule at the moved point.
    Samples do not see each other: the losses' scale is the range of each sample's own values. The size of a loss
    matters only among several targets, except under ``gradient``. A sample whose gradient is not finite stays where
    it is. Gradients are made in float32 at least, and scaled on their way through a network in half precision.

    Heads and targets are given by ``guider.using(targets={"edges": SpatialTarget(head=head, control=map)})``, also
    :class:`AppearanceTarget` and :class:`CorrespondenceTarget`.

    Source: Luo et al., "Readout guidance: learning control from diffusion features", arXiv 2312.02150.

    Args:
        guidance_scale: of classifier-free guidance; without effect if ``rule`` is given.
        rule: another combination rule, as ``{"name": "apg", "guidance_scale": 8}``.
        step_size: ``>= 0``, in units of ``z``.
        update: ``adam_sign``, ``gradient`` or ``normalised``.
        inner_steps: updates at each time, at least 1.
        branches: ``both``, or ``conditional`` for half the cost.
        readout_start, readout_stop: window of the updates, as positions on the noise axis; empty if equal. The last
            steps are best left alone: updates there leave artefacts.
        gradient_checkpointing: trade time for memory in the networks that support it.
        start, stop, enabled, scheduler_config: see :class:`Guider`; the window of updates and rule together.

    :meth:`stats` has, per evaluation and sample, ``loss_<name>`` of every target and ``gradient_norm``, both before
    the last update, and ``skipped``, the number of updates left out.

    Raises:
        ValueError: a value outside its range; in :meth:`check` targets that do not fit; a network that no gradient
            passes.
    """

    takes = {"targets": "a dict of SpatialTarget, AppearanceTarget or CorrespondenceTarget by name"}
    needs = ("targets",)
    moves_sample = True

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 7.5,
        rule: dict | None = None,
        step_size: float = 0.02,
        update: str = "adam_sign",
        inner_steps: int = 1,
        branches: str = "both",
        readout_start: float = 0.0,
        readout_stop: float = 0.5,
        gradient_checkpointing: bool = True,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("step_size", step_size, 0)
        check_range("inner_steps", inner_steps, 1)
        check_range("readout_start", readout_start, 0, 1)
        check_range("readout_stop", readout_stop, readout_start, 1)
        if update not in UPDATES:
            raise ValueError(unknown("update", update, UPDATES))
        if branches not in BRANCHES:
            raise ValueError(unknown("branches", branches, BRANCHES))
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.hold(inner_rule(rule, guidance_scale))
        self.guidance_scale = guidance_scale
        self.rule = rule
        self.step_size = step_size
        self.update = update
        self.inner_steps = inner_steps
        self.branches = branches
        self.readout_start, self.readout_stop = readout_start, readout_stop
        self.gradient_checkpointing = gradient_checkpointing
        self.needs_uncond |= branches == "both"

    @property
    def neutral(self) -> bool:
        return False

    def check(self, shape: tuple[int, ...], condition: Condition | None = None) -> None:
        super().check(shape, condition)
        targets = self.given("targets")
        if not isinstance(targets, Mapping) or not targets:
            got = targets if targets == {} else type(targets).__name__
            raise ValueError(f"targets={got}: accepted is {self.takes['targets']}, at least one")
        for name, target in targets.items():
            if not isinstance(target, Target):
                raise ValueError(f"targets[{name!r}]={type(target).__name__}: accepted is {self.takes['targets']}")
            target.check(name, shape)
        if torch.is_inference_mode_enabled():
            raise ValueError("Readout needs gradients, which torch.inference_mode forbids; use torch.no_grad")

    def initial(self, index: Tensor) -> Rows:
        return Rows(index, super().initial(index))

    def guide(self, point: Point, state: Any) -> tuple[Guided, Any]:
        rows = self.begun(point, state)
        if not self.active(point.t):
            return super().guide(point, rows)
        moved = self._moved(point, rows.index) if self._reads(point.t) else None
        here = point if moved is None else replace(point, z=moved)
        guided, inner_state = self.inner.guide(here, rows.inner_state)
        z = moved if guided.z is None else guided.z
        return replace(guided, z=z), Rows(rows.index, inner_state)

    def _reads(self, t: Tensor) -> bool:
        progress, slack = 1 - float(t), 1e-6  # times in float32 and float64 fall on the same side of an edge
        begun = self.readout_start == 0 or progress >= self.readout_start - slack
        return begun and self.readout_start < self.readout_stop and progress < self.readout_stop - slack

    def _moved(self, point: Point, index: Tensor) -> Tensor:
        """``z`` after the updates, in float32 at least."""
        denoiser = _uncompiled(point.denoiser)
        wide = torch.promote_types(point.z.dtype, torch.float32)
        z = point.z.detach().to(wide)
        conditions = [point.condition] + ([point.condition.null()] if self.branches == "both" else [])
        skipped = torch.zeros(len(z), device=z.device)
        with ExitStack() as stack:
            for module in {id(m): m for m in (denoiser.network, *(t.head for t in self._targets.values()))}.values():
                stack.enter_context(_frozen(module))
            references = [self._references(denoiser, point, z, condition, index) for condition in conditions]
            if self.gradient_checkpointing:
                stack.enter_context(_checkpointed(denoiser.network))
            for _ in range(self.inner_steps):
                gradient = torch.zeros_like(z)
                losses = {name: torch.zeros(len(z), device=z.device, dtype=wide) for name in self._targets}
                for condition, reference in zip(conditions, references, strict=True):
                    found, part = self._gradient(denoiser, point, z, condition, reference, index)
                    gradient += part
                    losses = {name: losses[name] + found[name] for name in losses}
                finite = gradient.isfinite().flatten(1).all(1)
                skipped += ~finite
                z = torch.where(expand(finite, z), self._updated(z, gradient), z)
        norm = gradient.flatten(1).norm(dim=1)
        self.note(**{f"loss_{name}": loss for name, loss in losses.items()}, gradient_norm=norm, skipped=skipped)
        return z

    @property
    def _targets(self) -> dict[str, Target]:
        return self.given("targets")

    def _references(self, denoiser, point: Point, z: Tensor, condition, index: Tensor) -> dict[str, Tensor]:
        """What the heads read of the references, by the target's name; one call for those that share one."""
        found: dict[str, Tensor] = {}
        pending = {n: target for n, target in self._targets.items() if isinstance(target, ReferenceTarget)}
        while pending:
            first = next(iter(pending.values()))
            alike = {n: t for n, t in pending.items() if t.reference is first.reference and t.noise is first.noise}
            noisy = first.noisy(denoiser.interpolant, point.t, z, index)
            with torch.no_grad():
                heads = [target.head for target in alike.values()]
                _, seen = capture(denoiser, heads, noisy, point.t, condition, timestep=point.timestep)
                for name, target in alike.items():
                    found[name] = target.head.read(seen, target.size(tuple(z.shape))).to(z.dtype)
                    del pending[name]
        return found

    @torch.enable_grad()
    def _gradient(
        self, denoiser, point: Point, z: Tensor, condition, references: dict[str, Tensor], index: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses ``(B,)`` of one branch by target, and the gradient of their weighted sum."""
        z = z.detach().requires_grad_()
        heads = [target.head for target in self._targets.values()]
        _, seen = capture(denoiser, heads, z, point.t, condition, timestep=point.timestep)
        reached = {name: f for name, f in seen.features.items() if f.requires_grad}
        if not reached:
            raise ValueError(
                f"no gradient reaches the sample from {list(seen.features)} of {type(denoiser.network).__name__}"
            )
        # In two stages: between heads and network the gradient can be scaled exactly, for networks in half precision.
        leaves = {name: f.detach().to(z.dtype).requires_grad_(name in reached) for name, f in seen.features.items()}
        seen = Captured(leaves, seen.times)
        span = (z.flatten(1).amax(1) - z.flatten(1).amin(1)).detach()
        losses, total = {}, torch.zeros(len(z), device=z.device, dtype=z.dtype)
        for name, target in self._targets.items():
            readout = target.head.read(seen, target.size(tuple(z.shape))).to(z)
            losses[name] = target.loss(readout, references.get(name), index, span)
            total = total + target.weight * losses[name]
        gradients = torch.autograd.grad(total.sum(), [leaves[name] for name in reached])
        scale = _power_of_two(gradients)
        outer = [(g * expand(scale, g)).to(f.dtype) for f, g in zip(reached.values(), gradients, strict=True)]
        (gradient,) = torch.autograd.grad(list(reached.values()), [z], outer)
        return {name: loss.detach() for name, loss in losses.items()}, gradient / expand(scale, gradient)

    def _updated(self, z: Tensor, gradient: Tensor) -> Tensor:
        if self.update == "gradient":
            return z - self.step_size * gradient
        return z - self.step_size * direction(gradient, self.update)


def direction(gradient: Tensor, update: str) -> Tensor:
    """The gradient ``(B, ...)`` as ``adam_sign``, ``g / (|g| + 1e-8)``, or ``normalised``, ``g / rms(g)``."""
    if update == "adam_sign":
        return gradient / (gradient.abs() + 1e-8)
    rms = gradient.flatten(1).square().mean(1).sqrt()
    return gradient / expand(rms.where(rms > 0, 1), gradient)


def _power_of_two(gradients) -> Tensor:
    """``(B,)``: what brings the largest element of every sample's gradients to between 1 and 2."""
    largest = torch.stack([g.flatten(1).abs().amax(1) for g in gradients]).amax(0)
    usable = largest.isfinite() & (largest > 0)
    return torch.exp2(-torch.log2(largest.where(usable, 1)).floor().clamp(-100, 100))


def _uncompiled(denoiser: Denoiser) -> Denoiser:
    """The same denoiser around a network that runs its sub-modules, which a compiled one does not."""
    network = denoiser.network
    inner = unwrap(network) if isinstance(network, nn.Module) else network
    return denoiser if inner is network else denoiser.with_network(inner)


@contextmanager
def _frozen(module) -> Iterator[None]:
    """Within, the weights need no gradient, so that nothing is kept for it."""
    names = [n for n, p in module.named_parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in names:  # by name: offloading puts others in their place
            module.get_parameter(name).requires_grad_(True)


@contextmanager
def _checkpointed(network) -> Iterator[None]:
    """Within, the network keeps no activations, if it can do without."""
    switched = hasattr(network, "enable_gradient_checkpointing") and not network.is_gradient_checkpointing
    if switched:
        try:
            network.enable_gradient_checkpointing()
        except ValueError:  # Diffusers' word for a network that does not support it
            switched = False
    try:
        yield
    finally:
        if switched:
            network.disable_gradient_checkpointing()
