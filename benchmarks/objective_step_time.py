"""Step time of training by an objective against a bare script of the same loss, and what flow-map losses cost.

All train the digits DiT of the demo: flow matching, PSD-M, and LSD with the derivative by dual numbers, by torch.func
and by central differences. The bare scripts have the same loss, AdamW, clipping, schedule and average of the weights,
and nothing else. Candidates take turns, so that a change of the machine's speed meets all; a ratio is the median over
rounds. Bounds (``--check``): every objective at most 1.05 times its bare script; LSD by dual numbers twice PSD-M.

    python benchmarks/objective_step_time.py --check
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _common import paired, ratio, report
from diffusers.optimization import get_scheduler
from torch import Tensor

from genkit.data.digits import Digits
from genkit.networks.dit import DiT
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.parts.forward_mode import exact_jvp
from genkit.training.trainer import Trainer

BOUND, LSD_BOUND = 1.05, 2.0
MODEL = dict(patch_size=4, hidden_size=160, num_layers=4, num_heads=4, mlp_ratio=3.0)  # that of the demo
BATCH, STEPS, LR, CLIP, DECAY, DIAGONAL, H = 128, 10**6, 1e-3, 10.0, 0.995, 0.5, 5e-3
ROUNDS, STEPS_A_ROUND = 40, 4

OBJECTIVES = {
    "flow_matching": dict(name="flow_matching"),
    "psd_m": dict(name="flow_map", loss="psd_m"),
    "lsd, dual": dict(name="flow_map", loss="lsd", jvp="dual"),
    "lsd, func": dict(name="flow_map", loss="lsd", jvp="func"),
    "lsd, finite_difference": dict(name="flow_map", loss="lsd", jvp="finite_difference", jvp_step=H),
}

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def psd(u: Network, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    with torch.no_grad():
        middle = (t + s) / 2
        first = u(x, t, middle)
        target = (first + u(x + column(middle - t) * first, middle, s)) / 2
    return u(x, t, s) - target


def lsd(jvp: Callable) -> Callable:
    def residual(u: Network, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        end, derivative = jvp(lambda s: x + column(s - t) * u(x, t, s), s)
        with torch.no_grad():
            target = u(end, s, s)
        return derivative - target

    return residual


def by_difference(fn: Callable, s: Tensor) -> tuple[Tensor, Tensor]:
    plus, minus = fn(s + H), fn(s - H)
    return (plus + minus) / 2, (plus - minus) / (2 * H)


RESIDUALS: dict[str, Callable] = {
    "psd_m": psd,
    "lsd, dual": lsd(lambda fn, s: exact_jvp(fn, (s,), (torch.ones_like(s),), "dual")),
    "lsd, func": lsd(lambda fn, s: exact_jvp(fn, (s,), (torch.ones_like(s),), "func")),
    "lsd, finite_difference": lsd(by_difference),
}


def bare(name: str, device: torch.device) -> Iterator[None]:
    """The loop that one would write for this one loss."""
    torch.manual_seed(0)
    source = Digits()
    images, labels = source.images.to(device), source.labels.to(device)
    network = DiT(**MODEL).to(device)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=STEPS)
    on = BATCH if name == "flow_matching" else int(DIAGONAL * BATCH)
    while True:
        order = torch.randperm(len(images), device=device)
        for i in range(0, len(order) - BATCH + 1, BATCH):
            index = order[i : i + BATCH]
            x0, c = images[index], labels[index]
            c = torch.where(torch.rand(BATCH, device=device) < 0.1, 10, c)
            a, b, eps = torch.rand(BATCH, device=device), torch.rand(BATCH, device=device), torch.randn_like(x0)
            off = torch.arange(BATCH, device=device) >= on
            t, s = torch.where(off, torch.maximum(a, b), a), torch.where(off, torch.minimum(a, b), a)
            x = column(1 - t) * x0 + column(t) * eps
            # A flow model has one time; a flow map is given both on its diagonal, too.
            end = None if name == "flow_matching" else t[:on]
            residual = network(x[:on], t[:on], end, c[:on]) - (eps - x0)[:on]
            loss = residual.square().sum()
            if name != "flow_matching":
                network.eval()
                r = RESIDUALS[name](lambda x, t, s, c=c: network(x, t, s, c[on:]), x[on:], t[on:], s[on:])
                network.train()
                loss = loss + r.square().sum()
            loss = loss / BATCH
            if not torch.isfinite(loss):
                raise RuntimeError("the loss is not finite")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - DECAY)
            yield


def ours(name: str, folder: Path) -> Iterator[int]:
    """The same in genkit's loop, with its log, item-wise randomness and every alarm on."""
    objective = dict(OBJECTIVES[name], condition_dropout=0.1)
    if name != "flow_matching":
        objective["diagonal_fraction"] = DIAGONAL
    config = TrainConfig(
        output_dir=folder,
        model=dict(network="dit", **MODEL),
        objective=objective,
        data=dict(name="digits"),
        optimizer=dict(name="AdamW", lr=LR),
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        global_batch_size=BATCH,
        max_train_steps=STEPS,
        checkpointing_steps=STEPS,
        max_grad_norm=CLIP,
        ema=dict(decays=[DECAY]),
    ).check()
    yield from Trainer(build(config), quiet=True).steps()


def several(loop: Iterator) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS_A_ROUND):
            next(loop)

    return run


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, Iterator] = {}
        for name in OBJECTIVES:
            loops |= {f"{name} bare": bare(name, device), name: ours(name, Path(folder, name.replace(", ", "_")))}
        seconds = paired({name: several(loop) for name, loop in loops.items()}, rounds=ROUNDS)
    rows, bounds = [], {}
    for name in OBJECTIVES:
        over = ratio(seconds, name, f"{name} bare")
        bounds[f"{name}: over its bare script"] = (over, BOUND)
        rows.append(
            {
                "objective": name,
                "ms a step": 1000 * sorted(seconds[name])[ROUNDS // 2] / STEPS_A_ROUND,
                "ms a bare step": 1000 * sorted(seconds[f"{name} bare"])[ROUNDS // 2] / STEPS_A_ROUND,
                "over bare": over,
                "over flow matching": ratio(seconds, name, "flow_matching"),
                "over PSD-M": ratio(seconds, name, "psd_m"),
            }
        )
    bounds["LSD by dual numbers over PSD-M"] = (ratio(seconds, "lsd, dual", "psd_m"), LSD_BOUND)
    report("objective_step_time", rows, bounds)


if __name__ == "__main__":
    main()
