"""One image, or a few, found by score distillation: the pixels or latents are what is trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from genkit.denoisers.base import Condition, Denoiser
from genkit.latents import standardise, unstandardise
from genkit.rng import ItemRNG, hash_seed
from genkit.training.parts.annealing import LinearSchedule, Schedule
from genkit.training.parts.fake import FakeModel, FullFake, LoraFake
from genkit.training.parts.losses import wide
from genkit.training.parts.score_distillation import (
    NEEDS_FAKE,
    Method,
    Weight,
    ask,
    gradient_loss,
    moving_target,
    needs_null,
    reconstruction_loss,
    residual,
    safe,
    weights,
)


def optimize_image(
    denoiser: Denoiser,
    x: Tensor,
    condition: Condition,
    *,
    method: Method = "sds",
    weight: Weight | None = None,
    guidance_scale: float | None = None,
    times: Schedule = LinearSchedule(),  # noqa: B008 (frozen)
    num_steps: int = 500,
    learning_rate: float = 1e-2,
    views: int = 1,
    clip: float | None = None,
    negative: Condition | None = None,
    fake: FullFake | LoraFake | None = None,
    vae: Any = None,
    seed: int = 0,
    callback: Callable[[int, Tensor], None] | None = None,
    quiet: bool = False,
) -> Tensor:
    """``x`` after ``num_steps`` Adam steps along ``g = w (e_T - b)``.

    The estimator is that of :mod:`genkit.training.parts.score_distillation`.

    With ``vae`` the items are pictures, and the reconstruction form regresses them on the decoded clean sample of the
    teacher: neither encoder nor decoder is differentiated.

    Args:
        denoiser: the frozen teacher.
        x: where to start, ``(B, ...)``: latents, or with ``vae`` pictures in [-1, 1].
        condition: of ``B`` items, with an unconditional branch where the method or the guidance needs one.
        weight: unset, as published.
        guidance_scale: in Diffusers' convention; unset, as published: 100 for ``sds`` and ``sjc``, 7.5 for the others,
            of which ``csd`` takes none. 1 where there is no condition.
        times: when the teacher is asked; ending lower than it starts sharpens the image.
        views: draws of noise and time per step, averaged.
        clip: bound on the root mean square of a draw's gradient.
        negative: the negative prompt of ``nfsd``.
        fake: settings of the model that follows ``x``, of ``vsd`` and ``dmd``; unset, a LoRA of rank 16 with one update
            a step. Its ``optimizer`` holds the settings of its AdamW, by default a rate of 1e-4.
        callback: called with the step and ``x`` after every step.

    Raises:
        ValueError: a setting that ``method`` has no use for or lacks; fewer conditions than items.
    """
    _check(method, len(x), condition, negative, fake, num_steps, views)
    guidance_scale = _scale(method, guidance_scale, condition)
    path, x = denoiser.interpolant, wide(x.detach()).clone().requires_grad_()
    conditions = condition.repeat(views) if condition.values else condition
    negatives = None if negative is None else negative.repeat(views)
    null = needs_null(method, guidance_scale, condition)
    denoiser.module.requires_grad_(False).eval()
    optimizer = torch.optim.Adam([x], lr=learning_rate, betas=(0.9, 0.99), eps=1e-15)
    model = FakeModel(fake or LoraFake(repeats=1), denoiser) if method in NEEDS_FAKE else None
    if model is not None:
        trained = [p for p in model.module.parameters() if p.requires_grad]
        fitting = torch.optim.AdamW(trained, **{"lr": 1e-4, **model.settings.optimizer})
    items = torch.arange(len(x) * views, device=x.device)
    bar = tqdm(range(num_steps), desc=method, disable=quiet or None, leave=False)
    try:
        for step in bar:
            with torch.no_grad():
                latents = x.detach() if vae is None else _encoded(vae, x)
                latents = latents.repeat_interleave(views, dim=0)
            rng = ItemRNG(hash_seed(seed, step), items)
            if model is not None:
                for _ in range(model.settings.repeats):
                    t, eps = model.settings.times.draw(rng), rng.normal(latents.shape[1:], dtype=latents.dtype)
                    error = model.errors(model(path.interpolate(latents, eps, t), t, conditions), latents, eps).mean()
                    fitting.zero_grad()
                    error.backward()
                    fitting.step()
            t, eps = times.draw(rng, step / num_steps), rng.normal(latents.shape[1:], dtype=latents.dtype)
            x_t = path.interpolate(latents, eps, t)
            teacher = ask(denoiser, x_t, t, conditions, null=null, negative=negatives)
            follower = None if model is None else model.epsilon(x_t, t, conditions)
            r = residual(method, teacher, eps, guidance_scale, follower)
            error = teacher.epsilon(guidance_scale) - eps
            w = weights(weight or ("dmd" if method == "dmd" else "sigma2"), t, path, error)
            r, w, _ = safe(r, w, clip)
            seen = x.repeat_interleave(views, dim=0)
            if vae is None:
                loss = gradient_loss(seen, r, w)
            else:
                target = _decoded(vae, moving_target(latents, r, t, path))
                loss = reconstruction_loss(seen, target, w, t, path)
            optimizer.zero_grad()
            (loss.sum() / views).backward()
            optimizer.step()
            if callback is not None:
                callback(step, x.detach())
    finally:
        if model is not None:
            model.remove()
    return x.detach()


def _check(method, items, condition, negative, fake, num_steps, views) -> None:
    for name, value in (("num_steps", num_steps), ("views", views)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for name, given in (("condition", condition), ("negative", negative)):
        if given is not None and given.values and len(given) != items:
            raise ValueError(f"{name} has {len(given)} items, x has {items}")
    if (negative is not None) != (method == "nfsd"):
        given = "no" if negative is None else "a"
        raise ValueError(f"method={method!r} with {given} negative condition: 'nfsd' needs one, the others take none")
    if fake is not None and method not in NEEDS_FAKE:
        raise ValueError(f"method={method!r} has no fake model; fake goes with {' and '.join(NEEDS_FAKE)}")


def _scale(method: Method, given: float | None, condition: Condition) -> float:
    if given is not None and (method == "csd" or not condition.values) and given != 1:
        why = "is the guidance alone, whatever its scale" if condition.values else "has no condition to guide by"
        raise ValueError(f"guidance_scale={given:g}: method={method!r} {why}")
    if given is not None or not condition.values:
        return 1.0 if given is None else given
    return {"sds": 100.0, "sjc": 100.0, "csd": 1.0}.get(method, 7.5)


def _encoded(vae: Any, pictures: Tensor) -> Tensor:
    return wide(standardise(vae, vae.encode(pictures.to(vae.dtype)).latent_dist.mode()))


@torch.no_grad()
def _decoded(vae: Any, latents: Tensor) -> Tensor:
    return wide(vae.decode(unstandardise(vae, latents).to(vae.dtype), return_dict=False)[0]).clamp(-1, 1)
