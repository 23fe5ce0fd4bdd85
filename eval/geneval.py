"""GenEval: does an image show the objects, counts, colours and places that its prompt names?

The rules alone, on what any detector found: this needs no detector and no network. arXiv 2310.11513.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]
TAGS: tuple[Tag, ...] = get_args(Tag)

CONFIDENCE, CONFIDENCE_OF_COUNTING = 0.3, 0.9
MOST_OF_A_CLASS = 16
SHRUNK_BY = 0.1
LEAST_COSINE = 0.5
PROMPTS, IMAGES_A_PROMPT = 553, 4


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Detection(_Part):
    """One object: ``box`` is left, top, right, bottom in pixels, ``score`` the detector's confidence.

    ``color`` is one of the ten names, or a number (logit or probability) for each of them; only prompts about colours
    read it. The paper's are by CLIP ViT-L/14 on the crop, everything outside of the mask grey. ``mask`` is for whoever
    judges colours, and not read here.
    """

    class_: str = Field(alias="class")
    box: tuple[float, float, float, float]
    score: float = Field(ge=0, le=1)
    color: Color | dict[Color, float] | None = None
    mask: Any = None

    @field_validator("box")
    @classmethod
    def _ordered(cls, box):
        if not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
            raise ValueError("expected left, top, right, bottom, finite, with left <= right and top <= bottom")
        return box

    @field_validator("color")
    @classmethod
    def _numbers(cls, color):
        if isinstance(color, dict) and (not color or not all(map(math.isfinite, color.values()))):
            raise ValueError("expected finite numbers by colour, at least one")
        return color

    @property
    def named_color(self) -> str | None:
        """The name, or the first with the largest number."""
        return max(self.color, key=self.color.__getitem__) if isinstance(self.color, dict) else self.color


class Clause(_Part):
    """``count`` of a class, all of a ``color``, in ``position`` to the objects of an earlier clause (its number)."""

    class_: str = Field(alias="class")
    count: int = Field(ge=1)
    color: Color | None = None
    position: tuple[Relation, int] | None = None


class Exclusion(_Part):
    """Not ``count`` or more of a class."""

    class_: str = Field(alias="class")
    count: int = Field(ge=1)


class Image(_Part):
    """A line of the benchmark's metadata (``tag``, ``include``, ``exclude``, ``prompt``) and the ``detections``."""

    tag: Tag
    include: list[Clause] = Field(min_length=1)
    exclude: list[Exclusion] = []
    prompt: str
    detections: list[Detection]
    filename: str | None = None

    @model_validator(mode="after")
    def _earlier(self):
        for i, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < i:
                raise ValueError(f"include {i}: position to clause {clause.position[1]}; accepted is an earlier one")
        return self


class Verdict(_Part):
    """Whether an image is right, and if not, why."""

    filename: str | None
    prompt: str
    tag: Tag
    correct: bool
    reasons: list[str]


class GenEval(_Part):
    """Shares in [0, 1]: ``overall`` the mean of the six tags' accuracies, None where a tag has no image.

    ``images_correct`` is over images, ``prompts_correct`` counts a prompt of which any image is right: neither is the
    published number.
    """

    overall: float | None
    accuracy: dict[Tag, float]
    images_correct: float
    prompts_correct: float
    images: int
    prompts: int
    notes: list[str]
    verdicts: list[Verdict]


def kept(detections: Sequence[Detection], *, counting: bool = False) -> dict[str, list[Detection]]:
    """Detections by class, the surest first: confidence above 0.3, or 0.9 for counting; the 16 surest of each class.

    Boxes that overlap stay. Of equal confidence, those listed first come first.
    """
    least = CONFIDENCE_OF_COUNTING if counting else CONFIDENCE
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least and len(found.setdefault(detection.class_, [])) < MOST_OF_A_CLASS:
            found[detection.class_].append(detection)
    return found


def relations(a: Detection, b: Detection) -> set[Relation]:
    """Where ``a`` is, seen from ``b``: none, one or two of left of, right of, above, below.

    The offset between the centres is shrunk, in width and in height, by a tenth of the sum of both sizes; a direction
    holds where what is left, over the length of the whole offset, exceeds 0.5.
    """
    (dx, left_x), (dy, left_y) = (_offset(a.box[k::2], b.box[k::2]) for k in (0, 1))
    if abs(left_x) < 1e-3 and abs(left_y) < 1e-3:
        return set()
    length = math.hypot(dx, dy)
    holds: dict[Relation, float] = {"left of": -left_x, "right of": left_x, "above": -left_y, "below": left_y}
    return {name for name, along in holds.items() if along / length > LEAST_COSINE}


def _offset(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """From the middle of interval ``b`` to that of ``a``, whole and shrunk."""
    whole = (a[0] + a[1] - b[0] - b[1]) / 2
    left = max(abs(whole) - SHRUNK_BY * (a[1] - a[0] + b[1] - b[0]), 0.0)
    return whole, math.copysign(left, whole)


def judge(image: Image) -> Verdict:
    """An image is right if every clause holds, each of its ``count`` surest objects, and no exclusion does.

    Raises:
        ValueError: a colour is asked for, and a detection that decides it has none.
    """
    objects = kept(image.detections, counting=image.tag == "counting")
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in image.include:
        group = objects.get(clause.class_, [])[: clause.count]
        wrong = _wrong(clause, group, groups, image)
        reasons += wrong
        groups.append(None if wrong else group)
    for exclusion in image.exclude:
        count = len(objects.get(exclusion.class_, []))
        if count >= exclusion.count:
            reasons.append(f"expected {exclusion.class_}<{exclusion.count}, found {count}")
    return Verdict(
        filename=image.filename, prompt=image.prompt, tag=image.tag, correct=not reasons, reasons=list(reasons)
    )


def _wrong(
    clause: Clause, group: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], image: Image
) -> list[str]:
    """Why the clause does not hold of the objects found for it, in few words; nothing where it does."""
    if len(group) < clause.count:
        return [f"expected {clause.class_}>={clause.count}, found {len(group)}"]
    if clause.color is not None:
        colors = [detection.named_color for detection in group]
        if None in colors:
            raise ValueError(f"{image.filename or repr(image.prompt)}: a {clause.class_} lacks the color asked for")
        if any(color != clause.color for color in colors):
            return [f"expected {clause.color} {clause.class_}, found {', '.join(map(str, colors))}"]
    if clause.position is None:
        return []
    wanted, target = clause.position
    others = groups[target]
    if others is None:
        return [f"no target for {clause.class_} to be {wanted}"]
    for detection in group:
        for other in others:
            found = relations(detection, other)
            if wanted not in found:
                return [f"expected {clause.class_} {wanted} target, found {' and '.join(sorted(found)) or 'neither'}"]
    return []


def geneval(images: Sequence[Image]) -> GenEval:
    """The scores of a set of images.

    Raises:
        ValueError: no images; a detection without the colour that its prompt asks for.

    Source: Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", arXiv
    2310.11513; the rules of its code, with its default thresholds.
    """
    if not images:
        raise ValueError("images is empty: there is nothing to score")
    verdicts = [judge(image) for image in images]
    by_tag: dict[Tag, list[bool]] = {}
    by_prompt: dict[tuple[Tag, str], list[bool]] = {}
    for verdict in verdicts:
        by_tag.setdefault(verdict.tag, []).append(verdict.correct)
        by_prompt.setdefault((verdict.tag, verdict.prompt), []).append(verdict.correct)
    accuracy = {tag: _share(by_tag[tag]) for tag in TAGS if tag in by_tag}
    missing = [tag for tag in TAGS if tag not in by_tag]
    notes = [f"no overall score: no images of {', '.join(missing)}"] if missing else []
    counts = {len(of) for of in by_prompt.values()}
    if len(by_prompt) != PROMPTS or counts != {IMAGES_A_PROMPT}:
        each = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(min(counts))
        notes.append(
            f"{len(by_prompt)} prompts with {each} images; the benchmark has {PROMPTS} with {IMAGES_A_PROMPT} each"
        )
    return GenEval(
        overall=None if missing else math.fsum(accuracy.values()) / len(TAGS),
        accuracy=accuracy,
        images_correct=_share([verdict.correct for verdict in verdicts]),
        prompts_correct=_share([any(of) for of in by_prompt.values()]),
        images=len(images),
        prompts=len(by_prompt),
        notes=notes,
        verdicts=verdicts,
    )


def _share(of: Sequence[bool]) -> float:
    return sum(of) / len(of)


def read_detections(path: str | Path) -> list[Image]:
    """Images from a JSON list of them, or from ``.jsonl`` with one a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; an image (named by its number from 0) with a key, class or value not accepted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of detections")
    text = path.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of images, found {type(rows).__name__}")
    return [_image(path, i, row) for i, row in enumerate(rows)]


def _image(path: Path, i: int, row: Mapping[str, Any]) -> Image:
    try:
        return Image.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: image {i}: {f'{where}: ' if where else ''}{first['msg']}") from None


def main(detections: str | Path, *, json_path: str | Path | None = None, quiet: bool = False) -> GenEval:
    """``genkit eval geneval DETECTIONS``: score, print a table unless ``quiet``, write every verdict where asked."""
    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise ValueError(f"{json_path}: the folder {Path(json_path).absolute().parent} does not exist")
    scores = geneval(read_detections(detections))
    if json_path is not None:
        Path(json_path).write_text(scores.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if not quiet:
        _print(scores)
    return scores


def _print(scores: GenEval) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("GenEval", "accuracy", title=f"{scores.images} images of {scores.prompts} prompts")
    for tag, share in scores.accuracy.items():
        table.add_row(tag, f"{share:.4f}")
    if scores.overall is not None:
        table.add_row("overall", f"{scores.overall:.4f}")
    console = Console()
    console.print(table)
    for note in scores.notes:
        console.print(f"note: {note}", highlight=False)
