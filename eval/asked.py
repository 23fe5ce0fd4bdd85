"""What generated images are asked to be images of: prompts, labels, or those of a reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.eval.inputs import ImageSet
from genkit.eval.metrics.base import FeatureSet

TEMPLATE = "a photo of a {}"


@dataclass(frozen=True)
class Asked:
    """What n images are asked to be of: ``labels`` ``(n,)``, ``prompts``, both, or neither for an unconditional model.

    ``of`` says where it comes from, for errors.
    """

    n: int
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    of: str = "what is asked"


def matched(
    reference: ImageSet | FeatureSet,
    n: int | None = None,
    *,
    class_names: Mapping[int, str] | Sequence[str] | None = None,
    template: str = TEMPLATE,
) -> Asked:
    """The label and the prompt of each reference image, as often as there, in the order of classes.

    This is the fair-benchmark protocol (arXiv 2603.14186). With another ``n`` than the reference's, item ``i`` is that
    of place ``floor(i N / n)`` in this order, so that each class keeps its share.

    Args:
        class_names: prompts are made of labels by these, where the reference has none of its own (by default the names
            that it knows); of synonyms separated by commas the first.
        template: such a prompt, with ``{}`` for the name.

    Raises:
        ValueError: ``n`` below 1, a label without a name, a template without ``{}``.
    """
    if n is not None and n < 1:
        raise ValueError(f"n={n}: must be at least 1")
    if template.count("{}") != 1:
        raise ValueError(f"template={template!r}: must have one {{}}, where the name of the class goes")
    name, names = _known(reference)
    assert reference.n is not None
    order = torch.arange(reference.n) if reference.labels is None else reference.labels.argsort(stable=True)
    n = reference.n if n is None else n
    chosen = order[torch.arange(n) * reference.n // n]
    labels = None if reference.labels is None else reference.labels[chosen]
    names = names if class_names is None else class_names
    prompts = None
    if reference.prompts is not None:
        prompts = [reference.prompts[i] for i in chosen.tolist()]
    elif labels is not None and names is not None:
        known: dict[int, str] = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        absent = sorted(set(labels.tolist()) - known.keys())
        if absent:
            raise ValueError(f"class_names: no name for label {absent[0]} of {name} ({len(absent)} lack one)")
        prompts = [template.replace("{}", known[label].split(",")[0].strip()) for label in labels.tolist()]
    return Asked(n, labels, prompts, f"reference {name!r}")


def _known(reference: ImageSet | FeatureSet) -> tuple[str, Mapping[int, str] | Sequence[str] | None]:
    if isinstance(reference, ImageSet):
        return reference.name, reference.class_names
    meta = reference.stats.meta  # of a file, where JSON has made texts of numbers
    names = meta.get("class_names")
    return meta.get("source", "statistics"), None if names is None else {int(k): v for k, v in names.items()}


def evenly(num_classes: int, n: int) -> Asked:
    """n labels in the order of classes, each of ``num_classes`` as often as the next, up to one."""
    if n < 1:
        raise ValueError(f"n={n}: must be at least 1")
    return Asked(n, torch.arange(n) * num_classes // n, of="classes equally often")


def as_asked(asked: Asked | Sequence[str] | Sequence[int] | Tensor | int) -> Asked:
    """Prompts, numbers of classes, or how many images of an unconditional model.

    Raises:
        ValueError: none at all, or anything else.
    """
    if isinstance(asked, Asked):
        return asked
    if isinstance(asked, int):
        if asked < 1:
            raise ValueError(f"asked={asked}: must be at least 1 image")
        return Asked(asked)
    values: list = asked.tolist() if isinstance(asked, Tensor) else list(asked)
    if values and all(isinstance(value, str) for value in values):
        return Asked(len(values), prompts=values)
    if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return Asked(len(values), torch.tensor(values))
    raise ValueError("asked: expected texts, whole numbers of classes, how many images, or what matched(...) gives")
