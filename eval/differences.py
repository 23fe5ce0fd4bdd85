"""In what two results differ beside the images, and what of it is known to matter."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from genkit.eval.result import Result
from genkit.eval.saved import RESULT

# What each part of a protocol does to the values, and whether that can be more than noise.
KNOWN = {
    "network": (True, "features of different networks: the values cannot be compared"),
    "resize": (True, "rules to resize by differ by more than models do; the doctor on the images says by how much"),
    "weights": (True, "the same network with other weights is another network"),
    "reference": (True, "another reference, or the same one under another name"),
    "reference_images": (True, "compression and what was done to the images before move distances by points"),
    "generated_images": (True, "compression and what was done to the images before move distances by points"),
    "n_real": (True, "Frechet distances fall with the number of images, by a constant over n, recall and coverage too"),
    "n_gen": (True, "Frechet distances fall with the number of images, by a constant over n"),
    "matched": (True, "with the reference's own labels or prompts distances are smaller than with others"),
    "metrics": (True, "another setting of the metric is another metric"),
    "seed": (False, "other draws where a metric or n draws: noise"),
    "device": (False, "rounding"),
    "versions": (False, "rounding, unless a library changed what it does"),
}


class Difference(BaseModel):
    """A part of the protocol that the two results have different, whether it ``matters``, and ``why``."""

    model_config = ConfigDict(frozen=True)

    part: str
    a: Any
    b: Any
    matters: bool
    why: str


class Comparison(BaseModel):
    """The differences of two protocols, what matters first, and of each metric that both have its values in A and B.

    A distance under another name, with another resize rule, is still its counterpart: ``fid | fid[clean]``.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    differences: list[Difference]
    values: dict[str, tuple[float, float]]


def result_file(path: str | Path) -> Path | None:
    """The file of a result: ``path`` itself, or in an evaluation's folder; None of anything else."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".json":
        return path
    return path / RESULT if (path / RESULT).is_file() else None


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare the protocols of two files of ``genkit eval run``.

    Raises:
        ValueError: a file that is no result.
    """
    results = []
    for path in (a, b):
        try:
            results.append(Result.load(path))
        except ValueError as error:
            raise ValueError(f"{path} is no result of genkit eval run") from error
    first, second = (_parts(result) for result in results)
    names = [*first, *(name for name in second if name not in first)]
    # A metric that only one of them has makes no other one incomparable.
    both = [name for name in names if (name in first and name in second) or not name.startswith("metrics.")]
    found = []
    for name in both:
        x, y = first.get(name), second.get(name)
        if x != y:
            matters, why = KNOWN[name.partition(".")[0]]
            found.append(Difference(part=name, a=x, b=y, matters=matters, why=why))
    return Comparison(
        differences=sorted(found, key=lambda difference: not difference.matters),
        values=_shared(*(result.values for result in results)),
    )


def _parts(result: Result) -> dict[str, Any]:
    """A protocol's parts by name, extractors, metrics and versions taken apart; not what was generated."""
    parts = result.protocol.model_dump(exclude={"generated", "extractor", "metrics", "versions"})
    names = ("network", "resize", "weights")
    pieces = result.protocol.extractor.split("/")
    # An extractor of one's own may be called anything.
    extractor = dict(zip(names, pieces, strict=True)) if len(pieces) == 3 else {"network": result.protocol.extractor}
    metrics = {f"metrics.{name}": settings for name, settings in result.protocol.metrics.items()}
    return extractor | parts | metrics | {f"versions.{k}": v for k, v in result.protocol.versions.items()}


def _shared(a: dict[str, float], b: dict[str, float]) -> dict[str, tuple[float, float]]:
    def plain(name: str) -> str:
        return name.partition("[")[0]

    found = {}
    for name, value in a.items():
        others = [name] if name in b else [other for other in b if plain(other) == plain(name) and other not in a]
        if len(others) == 1:
            other = others[0]
            found[name if other == name else f"{name} | {other}"] = (value, b[other])
    return found


def show(found: Comparison) -> None:
    """Print both tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if found.values:
        table = Table("metric", "A", "B", "A - B", title="Values", title_justify="left")
        for name, (a, b) in found.values.items():
            table.add_row(Text(name), f"{a:.6g}", f"{b:.6g}", f"{a - b:+.4g}")
        console.print(table)
    if not found.differences:
        console.print("The protocols are the same: only the images differ.")
        return
    table = Table("", "A", "B", "matters", "", title="Protocol", title_justify="left")
    for difference in found.differences:
        matters = "yes" if difference.matters else "hardly"
        texts = (difference.part, str(difference.a), str(difference.b), matters, difference.why)
        table.add_row(*map(Text, texts))
    console.print(table)
