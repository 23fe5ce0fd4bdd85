"""The folder of an evaluation: its result, and the images that a report shows of it."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from genkit._files import save_tensors
from genkit.eval.directions import better
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.metrics.realism import Realism
from genkit.eval.per_class import per_class
from genkit.eval.processes import rank_and_count, wait
from genkit.eval.result import Result

RESULT, IMAGES, SCORES = "result.json", "images.safetensors", "scores.safetensors"
FIRST, EXTREMES = 64, 16


@dataclass(frozen=True)
class Evaluation:
    """A result, and uint8 images ``(k, C, H, W)``: the ``first``, and by the score in ``ranked`` the ``worst`` and
    ``best`` ones, extreme first.

    ``scores`` has what was measured of every single image, ``(n,)`` by name; ``labels`` ``(n,)`` the classes that they
    were asked for, where known. ``items`` ``(k,)`` are the numbers of the ``first`` ones. ``code_counts`` ``(K,)`` says
    how often a tokenizer used each of its codes.
    """

    folder: Path
    result: Result
    images: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    code_counts: Tensor | None = None
    items: Tensor | None = None

    @property
    def ranked(self) -> str | None:
        return ranking_score(self.scores)


def ranking_score(scores: Mapping[str, Tensor]) -> str | None:
    """The score by which images are worst and best: ``realism``, else the first by name that has a better way."""
    return min((name for name in scores if better(name)), key=lambda name: (name != "realism", name), default=None)


def extremes(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers of the ``worst`` and of the ``best`` images, extreme first; nothing where nothing ranks them."""
    name = ranking_score(scores)
    if name is None:
        return {}
    order = scores[name].argsort(stable=True, descending=better(name) == "higher")  # the best first
    k = min(EXTREMES, len(order) // 2)
    return {"worst": order.flip(0)[:k], "best": order[:k]}


def refuse_other(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where the folder holds a finished evaluation of other settings: one of the same is replaced.

    ``settings`` are of the protocol, as far as known yet, and ``made_with``.
    """
    file = Path(folder) / RESULT
    if not file.is_file():
        return
    result = json.loads(file.read_text(encoding="utf-8"))
    there = {**result["protocol"], "made_with": result.get("made_with", {})}
    wanted = json.loads(json.dumps(settings, default=str))
    told = [f"{key} was {there.get(key)!r}, now {wanted[key]!r}" for key in wanted if there.get(key) != wanted[key]]
    if told:
        raise ValueError(f"output={str(folder)!r} holds an evaluation of other settings ({'; '.join(told)})")


def first_items(n: int, labels: Tensor | None) -> Tensor:
    """The numbers of the images, at most ``FIRST`` of n, that are shown first: of labels ``(n,)`` one of each class,
    then a second one, and so on; of more classes than ``FIRST`` some, drawn once and for all. Without labels the
    numbers count from 0.
    """
    if labels is None:
        return torch.arange(min(n, FIRST))
    classes = labels.unique()
    if len(classes) > FIRST:
        classes = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))]
    of = [(labels == label).nonzero()[:, 0][:FIRST].tolist() for label in classes[:FIRST]]
    turns = (rows[k] for k in range(FIRST) for rows in of if k < len(rows))
    return torch.tensor(list(itertools.islice(turns, FIRST)))


def save_evaluation(
    folder: str | Path,
    result: Result,
    reference: FeatureSet | None,
    generated: FeatureSet,
    scores: Mapping[str, Tensor] | None = None,
) -> Result:
    """Write images and scores and, last and in one move, ``result.json``: with it the evaluation is whole.

    The first images (``first_items``) are the same ones in every evaluation of as many with the same labels, so that
    reports show models side by side. Where there are features of both sides, images are ranked by realism. Of several
    processes all call it, the first writes; the result returned, with its values by class, is the one in the folder.

    Args:
        scores: what metrics gave for every single image, ``(n,)`` by name.

    Raises:
        ValueError: see :func:`refuse_other`.
    """
    protocol = result.protocol.model_dump(mode="json", exclude={"device", "versions"})
    refuse_other(folder, {**protocol, "made_with": result.made_with})
    folder, scores = Path(folder), dict(scores or {})
    ranks = Realism()
    if "realism" not in scores and not ranks.missing(
        *(set() if s is None else s.fields for s in (reference, generated))
    ):
        assert reference is not None and reference.features is not None
        if generated.stats.dim and len(reference.features) > ranks.k:
            scores |= ranks.every(reference, generated)
    result = result.model_copy(update={"per_class": per_class(reference, generated, scores)})
    if rank_and_count()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).unlink(missing_ok=True)  # what an earlier evaluation left here is whole no longer
        known = dict(scores) if generated.labels is None else {**scores, "labels": generated.labels.long()}
        shown: dict[str, Tensor] = {}
        if generated.images is not None:
            items = first_items(generated.images.n, generated.labels)
            chosen = {"first": items, **extremes(scores)}
            shown = {name: generated.images.load(rows) for name, rows in chosen.items() if len(rows)}
            known["items"] = items
        if generated.model is not None and generated.model.codes is not None:
            known["code_counts"] = generated.model.codes.counts
        save_tensors(folder / IMAGES, shown)
        save_tensors(folder / SCORES, known)
        result.save(folder / RESULT)
    wait()
    return result


def load_evaluation(folder: str | Path) -> Evaluation:
    """What :func:`save_evaluation` wrote.

    Raises:
        FileNotFoundError: there is no whole evaluation in the folder.
    """
    folder = Path(folder)
    if not (folder / RESULT).is_file():
        raise FileNotFoundError(f"{folder}: no {RESULT}, so no evaluation that was finished")
    images, scores = (load_file(folder / name) if (folder / name).is_file() else {} for name in (IMAGES, SCORES))
    labels, counts, items = (scores.pop(name, None) for name in ("labels", "code_counts", "items"))
    return Evaluation(folder, Result.load(folder / RESULT), images, scores, labels, counts, items)
