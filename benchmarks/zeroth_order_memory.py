"""Memory of learning a token by ZOODiP, beside drawing and beside back-propagation, on one text-to-image network.

A UNet2DConditionModel of 18 million weights with its text encoder, built from a configuration; latents of 64 x 64, one
sample. ``weights`` is what parameters take, ``computed`` all that operators make and that is alive at the most. Drawing
is a step of sampling without guidance, in int8 as ZOODiP has it. Back-propagation learns the same token through the
same int8 weights (``int8``), and through weights in float32, which is the usual textual inversion.

ZOODiP takes at most 1.1 of what drawing takes, and at most a third of back-propagation, int8 or not.
"""

import gc
from collections.abc import Callable

import torch
from _common import report
from _memory import Peak
from diffusers import UNet2DConditionModel

from genkit.denoisers import from_pipeline
from genkit.denoisers.base import Condition
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training.objectives.base import Batch
from genkit.training.objectives.zoodip import ZOODiP, ZOODiPConfig

SIDE, MIB = 64, 2**20


def objective(quantization: str) -> ZOODiP:
    torch.manual_seed(0)
    pipe = tiny.pipeline("sd15")
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    pipe.register_modules(unet=unet.requires_grad_(False).eval())
    config = ZOODiPConfig(token="<thing>", initializer="a", templates=["a {}"], quantization=quantization)
    return ZOODiP(config, from_pipeline(pipe), pipe=pipe)


def drawing(made: ZOODiP) -> Callable[[], None]:
    z = torch.randn(1, 4, SIDE, SIDE)

    @torch.no_grad()
    def run() -> None:
        condition = made.student.encode(made.pipe, prompt=["a <thing>"])
        made.student(z, torch.full((1,), 0.7), condition)

    return run


def zeroth_order(made: ZOODiP) -> Callable[[], None]:
    x0, index = torch.randn(1, 4, SIDE, SIDE), torch.zeros(1, dtype=torch.int64)
    optimizer = torch.optim.Adam(made.embedding.parameters(), lr=5e-3, eps=1e-3)

    def run() -> None:
        batch = Batch(x0, Condition(), index, {"x0": x0}, None, 0, 10)
        for loss in made.losses(made.phases(0)[0], batch, ItemRNG(0, index)):
            loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.updated(made.phases(0)[0])

    return run


def back_propagation(made: ZOODiP) -> Callable[[], None]:
    x0, eps = torch.randn(2, 1, 4, SIDE, SIDE)
    t = torch.full((1,), 0.7)
    optimizer = torch.optim.Adam(made.embedding.parameters(), lr=5e-3, eps=1e-3)
    encode = type(made.student).encode.__wrapped__  # type: ignore[attr-defined]  # drawing's is without gradient

    def run() -> None:
        z = made.student.interpolant.interpolate(x0, eps, t)
        condition = encode(made.student, made.pipe, prompt=["a <thing>"])
        (made.student(z, t, condition).raw - eps).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in made.embedding.parameters())
        optimizer.step()
        optimizer.zero_grad()

    return run


def measured(make: Callable[[ZOODiP], Callable[[], None]], quantization: str) -> dict[str, float]:
    """MiB."""
    made = objective(quantization)
    modules = (made.student.module, made.pipe.text_encoder, made)
    known = {id(p): p for m in modules for p in m.parameters()}
    weights = sum(p.numel() * p.element_size() for p in known.values()) / MIB
    run = make(made)
    run()  # optimiser states are there, and what is made once
    gc.collect()
    with Peak(tuple(known.values())) as mode:
        run()
    computed = mode.alive.most / MIB
    return {"weights": weights, "computed": computed, "all": weights + computed}


ROWS = {
    "drawing, int8": (drawing, "int8"),
    "ZOODiP, int8": (zeroth_order, "int8"),
    "back-propagation, int8": (back_propagation, "int8"),
    "back-propagation, float32": (back_propagation, "none"),
}


def main() -> None:
    rows = {name: measured(*how) for name, how in ROWS.items()}
    all_of = {name: row["all"] for name, row in rows.items()}
    ours = all_of["ZOODiP, int8"]
    bounds = {"ZOODiP / drawing": (ours / all_of["drawing, int8"], 1.1)}
    for kind in ("int8", "float32"):
        bounds[f"ZOODiP / back-propagation, {kind}"] = (ours / all_of[f"back-propagation, {kind}"], 1 / 3)
    report("zeroth_order_memory", [{"": name, **row} for name, row in rows.items()], bounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
