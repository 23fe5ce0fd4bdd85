"""One number of two sets of images, in one call: ``genkit.eval.fid(real, fake)``.

``real`` and ``fake`` are folders, ``.npz`` files, saved statistics, tensors: whatever :func:`genkit.eval.run.evaluate`
takes, whose further options these functions take, too (``n``, ``batch_size``, ``device`` ...). A number without its
protocol cannot be compared with others: ``evaluate`` returns both.
"""

from typing import Any

from genkit.eval.extractors.base import Extractor, get_extractor
from genkit.eval.metrics.inception_score import InceptionScores
from genkit.eval.metrics.prdc import PRDC
from genkit.eval.run import evaluate


def fid(reference: Any, generated: Any, *, extractor: str | Extractor = "inception", **options: Any) -> float:
    """The Frechet inception distance: by default TensorFlow's Inception of 2015 behind TF1's resize rule.

    With another extractor, the Frechet distance of its features, which is no FID.

    Raises:
        ValueError: no weights of Inception (with the command that fetches them), and what ``evaluate`` raises.

    Source: Heusel et al., arXiv 1706.08500.
    """
    made = get_extractor(extractor)
    return evaluate(reference, generated, metrics=["frechet"], extractor=made, **options).values[made.distance]


def fd_dinov2(reference: Any, generated: Any, *, extractor: str | Extractor = "dinov2", **options: Any) -> float:
    """The Frechet distance of the features of DINOv2.

    Raises:
        ValueError: no weights, and what ``evaluate`` raises.

    Source: Stein et al., arXiv 2306.04675.
    """
    return fid(reference, generated, extractor=extractor, **options)


def kid(reference: Any, generated: Any, *, extractor: str | Extractor = "inception", **options: Any) -> float:
    """The kernel Inception distance over all pairs of images, without bias; it may be negative.

    The mean over random subsets is ``evaluate(..., metrics=["kid"])``'s.

    Source: Binkowski et al., arXiv 1801.01401.
    """
    return evaluate(reference, generated, metrics=["kid:subsets=0"], extractor=extractor, **options).values["kid"]


def cmmd(reference: Any, generated: Any, *, extractor: str | Extractor = "clip", **options: Any) -> float:
    """The maximum mean discrepancy of CLIP's embeddings, times 1000.

    Source: Jayasumana et al., arXiv 2401.09603.
    """
    return evaluate(reference, generated, metrics=["cmmd"], extractor=extractor, **options).values["cmmd"]


def inception_score(
    generated: Any,
    *,
    splits: int = 10,
    shuffle_seed: int = 0,
    extractor: str | Extractor = "inception",
    **options: Any,
) -> InceptionScores:
    """The Inception Score, its mean and standard deviation over splits.

    Source: Salimans et al., arXiv 1606.03498.
    """
    metric = f"inception_score:splits={splits},seed={shuffle_seed}"
    values = evaluate(None, generated, metrics=[metric], extractor=extractor, **options).values
    return InceptionScores(values["inception_score"], values["inception_score_std"])


def precision_recall(
    reference: Any,
    generated: Any,
    *,
    pr_k: int = 3,
    dc_k: int = 5,
    extractor: str | Extractor = "inception",
    **options: Any,
) -> PRDC:
    """Precision and recall, with ``pr_k`` neighbours, and density and coverage, with ``dc_k``.

    Sources: Kynkaanniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797.
    """
    metric = f"prdc:pr_k={pr_k},dc_k={dc_k}"
    values = evaluate(reference, generated, metrics=[metric], extractor=extractor, **options).values
    return PRDC(**{name: values[name] for name in PRDC._fields})
