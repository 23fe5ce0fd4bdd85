"""Measured features in a file, so that a reference is read once for many evaluations."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from genkit._files import save_tensors
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.statistics import FeatureStats

FORMAT = "genkit features 1"
SUFFIX = ".safetensors"


def is_features(path: str | Path) -> bool:
    """Whether ``path`` is a file of the kind that :func:`save_features` writes, by its name."""
    return Path(path).suffix == SUFFIX and Path(path).is_file()


def save_features(path: str | Path, side: FeatureSet) -> None:
    """Write statistics, features, logits, labels and prompts, as far as there are any, in one move.

    What made the features, and what images of, is in ``FeatureStats.meta``. The images themselves are not saved.

    Raises:
        ValueError: a name without ``.safetensors``, or statistics that do not say their n.
    """
    path, stats = Path(path), side.stats
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: features are saved with the suffix {SUFFIX}")
    if stats.n is None:
        raise ValueError(f"{path}: the statistics do not say their n")
    tensors = {"mean": stats.mean, "scatter": stats.scatter}
    rows = {"features": side.features, "logits": side.logits, "labels": side.labels}
    tensors |= {name: of for name, of in rows.items() if of is not None}
    about = {"format": FORMAT, "n": stats.n, "meta": stats.meta, "prompts": _listed(side.prompts)}
    save_tensors(path, tensors, {"genkit": json.dumps(about)})


def load_features(path: str | Path) -> FeatureSet:
    """What :func:`save_features` wrote.

    Raises:
        ValueError: another file, or tensors that do not fit each other.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("genkit", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable file of features ({error})") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: expected features that 'genkit eval features' wrote, found {sorted(tensors)}")
    stats = FeatureStats(len(tensors["mean"]))
    stats.n, stats.mean, stats.scatter, stats.meta = about["n"], tensors["mean"], tensors["scatter"], about["meta"]
    rows = {name: tensors.get(name) for name in ("features", "logits", "labels")}
    sizes = {name: len(of) for name, of in {**rows, "prompts": about["prompts"]}.items() if of is not None}
    if any(size != stats.n for size in sizes.values()) or stats.scatter.shape != (stats.dim, stats.dim):
        raise ValueError(f"{path}: n={stats.n}, rows {sizes} and {stats.dim} dimensions do not fit together")
    return FeatureSet(stats, **rows, prompts=about["prompts"])


def _listed(prompts: Sequence[str] | None) -> list[str] | None:
    return None if prompts is None else list(prompts)
