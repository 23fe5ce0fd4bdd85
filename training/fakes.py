"""Samples of a student in shards on the disk: what data of ``with_fakes`` sets beside real ones."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from genkit.data.base import Source
from genkit.rng import ItemRNG
from genkit.training.build import Run
from genkit.training.samples import draw


def write_fakes(
    run: Run,
    folder: Path,
    n: int,
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    quiet: bool = False,
) -> None:
    """``n`` samples of ``run``'s student, without guidance, in shards of ``batch_size``; those that are there are kept.

    Sample ``i`` depends on ``(seed, i)`` and has the condition of record :func:`spread` ``[i]``. A shard appears whole
    or not at all, so a run that was killed goes on with the first that is missing. Ranks take every ``world_size``-th.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = spread(run.source, n)
    first = run.source.__getitems__(records[:1]) | {"index": records[:1]}
    shape = tuple(run.inputs(first, device).x0.shape[1:])
    starts = [s for s in range(0, n, batch_size) if s // batch_size % world_size == rank]
    for start in tqdm(starts, desc="fakes", unit="shard", delay=2, disable=quiet or None):
        target = folder / f"fakes-{start // batch_size:05d}.safetensors"
        if target.exists():
            continue
        items = torch.arange(start, min(start + batch_size, n))
        read = run.source.__getitems__(records[items])
        tensors = {"fake": draw(run, read, ItemRNG(seed, items, device), num_inference_steps, shape)}
        if run.inputs.labels:
            tensors["class_labels"] = read["class_labels"]
        elif run.inputs.prompts:
            tensors["records"] = records[items]
        save_whole(tensors, target)


def spread(source: Source, n: int) -> Tensor:
    """``n`` records of ``source``, evenly spread, so that they follow its class law; int64 ``(n,)``."""
    items = torch.arange(n)
    return items if source.length is None else items * source.length // n


def save_whole(tensors: dict[str, Tensor], target: Path) -> None:
    """Write a safetensors file that is whole whenever it has its name."""
    temporary = target.with_name(f".writing-{target.name}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
