"""``genkit demo``: the main job on data that is at hand. Train, distil, sample, guide, measure, report."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table as RichTable
from tqdm.auto import tqdm

from genkit.data.digits import Digits
from genkit.eval.baseline import real_halves
from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import read_images, to_uint8
from genkit.eval.metrics.base import FeatureSet
from genkit.eval.report import Code, Column, Figure, Gallery, ImageGrid, ProtocolBlock, Section, Table, write_report
from genkit.eval.result import Result, require_comparable
from genkit.eval.run import evaluate, measure
from genkit.hub import model_card
from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.pipelines.commands import parse_guider
from genkit.rng import ItemRNG
from genkit.training.__main__ import train
from genkit.training.config import load_config

SEED = 0
METRICS = ("frechet", "prdc", "accuracy")


@dataclass(frozen=True)
class Setting:
    """One row of the table: a model, its steps, and a guider as ``genkit sample`` takes it."""

    model: str
    steps: int
    guider: str | None = None

    @property
    def key(self) -> str:
        return f"{self.model}-{self.steps}" + (f"-{self.guider.partition(':')[0]}" if self.guider else "")

    @property
    def title(self) -> str:
        guider = f", {self.guider.partition(':')[0].upper()}" if self.guider else ""
        return f"{self.model}, {self.steps} step{'s' if self.steps > 1 else ''}{guider}"


GUIDERS = ("cfg:guidance_scale=2", "apg:guidance_scale=2,eta=0,norm_threshold=2.5,momentum=-0.5")
SETTINGS = (
    *(Setting("teacher", n) for n in (1, 2, 4, 8, 32)),
    *(Setting("student", n) for n in (1, 2, 4)),
    *(Setting("teacher", n, guider) for guider in GUIDERS for n in (8, 32)),
)


def run(
    output: Path, *, fresh: bool = False, quiet: bool = False, overrides: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Make everything below ``output`` that is not there yet; returns the path of the report.

    Args:
        fresh: start over: what an earlier demo left in ``output`` is deleted.
        overrides: ``key=value`` settings that replace those of the recipe of ``teacher`` or ``student``.

    Raises:
        ValueError: ``fresh`` on a folder that holds something else than a demo.
    """
    console = Console(quiet=quiet)
    disable_progress_bar()  # Diffusers' own, one for every loading of a small pipeline
    if fresh and output.is_dir():
        _clear(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps({"made_by": "genkit demo"}) + "\n", encoding="utf-8")
    start = time.monotonic()
    seconds = {}
    for name, recipe, own in (
        ("teacher", "flow_matching", []),
        ("student", "flow_map_lsd", [f"model.pretrained={output / 'teacher' / 'pipeline'}"]),
    ):
        changes = [*own, *(overrides or {}).get(name, ())]
        seconds[name] = _train(name, recipe, changes, output, console, quiet)
    console.print(f"Sampling and measuring {len(SETTINGS)} settings of 1,797 images each")
    began = time.monotonic()
    real = measure(read_images("digits"), get_extractor("digits"), quiet=True)
    bar = tqdm(SETTINGS, unit="setting", disable=quiet or None, leave=False)
    results = {setting: _evaluate(setting, output, real) for setting in bar}
    seconds["sampling and evaluation"] = time.monotonic() - began
    summary = _summary(results, real, seconds)
    (output / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name in ("teacher", "student"):
        _card(name, output, summary)
    report = _report(output, results, summary)
    _print(console, summary, output, report, time.monotonic() - start)
    return report


def _clear(output: Path) -> None:
    if any(output.iterdir()) and not (output / "demo.json").is_file():
        raise ValueError(f"output={str(output)!r} holds no earlier demo; --fresh would delete what is there")
    shutil.rmtree(output)


def _train(name: str, recipe: str, overrides: list[str], output: Path, console: Console, quiet: bool) -> float:
    """Train one model unless it is there; returns the seconds that its training took, also if that was earlier."""
    folder, record = output / name, output / name / "seconds.json"
    if record.is_file():
        console.print(f"The {name} is there already: {folder / 'pipeline'}")
        return json.loads(record.read_text(encoding="utf-8"))["seconds"]
    console.print(f"Training the {name} (configs/digits/{recipe}.yaml)")
    with resources.as_file(resources.files("genkit.configs") / "digits" / f"{recipe}.yaml") as path:
        config = load_config(path, [f"output_dir={folder}", "resume=latest", *overrides])
    began = time.monotonic()
    train(config, quiet=quiet)
    seconds = time.monotonic() - began
    record.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n", encoding="utf-8")
    return seconds


def _evaluate(setting: Setting, output: Path, real: FeatureSet) -> Result:
    """Sample and measure one setting unless its result, for these very weights, is there."""
    weights = output / setting.model / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    made_of = hashlib.sha256(weights.read_bytes() + repr((setting, SEED)).encode()).hexdigest()
    path, images_path = output / "samples" / f"{setting.key}.json", output / "samples" / f"{setting.key}.npz"
    if path.is_file() and images_path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there["made_of"] == made_of:
            return Result.model_validate(there["result"])
    pipe = ClassConditionalPipeline.from_pretrained(output / setting.model / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    guider = None if setting.guider is None else parse_guider(setting.guider)
    labels = Digits().labels
    images, calls = [], 0
    # Noise belongs to the item: image i of every setting starts from the same noise.
    for items in torch.arange(len(labels)).split(256):
        noise = ItemRNG(SEED, items).normal((1, 8, 8))
        out = pipe(labels[items], setting.steps, guider=guider, latents=noise, output_type="latent")
        images.append(to_uint8(out.images))
        calls = out.network_calls
    pixels = torch.cat(images)
    result = evaluate(real, (pixels, labels), metrics=METRICS, extractor="digits", nfe=calls, seed=SEED, quiet=True)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(images_path, images=pixels.numpy(), labels=labels.numpy())
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps({"made_of": made_of, "result": result.model_dump()}, indent=2) + "\n", encoding="utf-8"
    )
    partial.replace(path)
    return result


def _summary(results: dict[Setting, Result], real: FeatureSet, seconds: dict[str, float]) -> dict[str, Any]:
    """Every figure of the report."""
    require_comparable(list(results.values()))
    distance = {s: r.values["frechet_distance"] for s, r in results.items()}
    accuracy = {s: r.values["class_accuracy"] for s, r in results.items()}
    halves, spread = real_halves(real, seed=SEED)["frechet_distance"]
    teacher = {n: Setting("teacher", n) for n in (1, 32)}
    student = {n: Setting("student", n) for n in (1, 2)}
    best = distance[teacher[32]]
    return {
        "rows": [
            {
                "key": s.key,
                "model": s.model,
                "steps": s.steps,
                "guider": s.guider,
                "method": {"teacher": "flow_matching", "student": "flow_map"}[s.model],
                "network_calls": r.nfe,
                **r.values,
            }
            for s, r in results.items()
        ],
        "real_halves_frechet_distance": halves,
        "real_halves_standard_deviation": spread,
        "ratios": {
            "teacher, 32 steps / real halves": best / halves,
            "student, 1 step / teacher, 32 steps": distance[student[1]] / best,
            "student, 2 steps / teacher, 32 steps": distance[student[2]] / best,
            "teacher, 1 step / student, 1 step": distance[teacher[1]] / distance[student[1]],
            "lowest class accuracy of these": min(accuracy[s] for s in (teacher[32], student[1], student[2])),
        },
        "targets": {
            "teacher, 32 steps / real halves": "at most 2",
            "student, 1 step / teacher, 32 steps": "at most 2",
            "student, 2 steps / teacher, 32 steps": "at most 1.5",
            "teacher, 1 step / student, 1 step": "at least 6",
            "lowest class accuracy of these": "at least 0.95",
        },
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "protocol": next(iter(results.values())).protocol.model_dump(),
    }


def _card(name: str, output: Path, summary: dict[str, Any]) -> None:
    """The model card of one pipeline folder: its recipe, and its rows of the table."""
    config = yaml.safe_load((output / name / "config.yaml").read_text(encoding="utf-8"))
    metrics = {
        f"{value} ({row['steps']} steps)": row[value]
        for row in summary["rows"]
        if row["model"] == name and row["guider"] is None
        for value in ("frechet_distance", "class_accuracy")
    }
    code = load_lines(output).replace("student", name)
    card = model_card(config["objective"]["name"], config, metrics, code, title=f"Handwritten digits: {name}")
    (output / name / "pipeline" / "README.md").write_text(str(card), encoding="utf-8")


# -- what is shown ----------------------------------------------------------------------------------------------------


def load_lines(output: Path) -> str:
    """Three lines of Python that load the student and draw a digit of each class."""
    return (
        "from genkit.pipelines import ClassConditionalPipeline\n"
        f'pipe = ClassConditionalPipeline.from_pretrained("{(output / "student" / "pipeline").as_posix()}")\n'
        "images = pipe(class_labels=list(range(10)), num_inference_steps=1).images"
    )


def _report(output: Path, results: dict[Setting, Result], summary: dict[str, Any]) -> Path:
    columns = [
        Column("setting"),
        Column("network calls"),
        Column("Frechet distance", "lower"),
        Column("class accuracy", "higher"),
        Column("precision", "higher"),
        Column("recall", "higher"),
        Column("density"),
        Column("coverage", "higher"),
    ]
    names = ("frechet_distance", "class_accuracy", "precision", "recall", "density", "coverage")
    halves = summary["real_halves_frechet_distance"]
    rows: list[list[Any]] = [[s.title, int(r.nfe or 0), *(r.values[n] for n in names)] for s, r in results.items()]
    rows.append(["two disjoint halves of the real images", None, halves, *[None] * 5])
    ratios = [[name, value, summary["targets"][name]] for name, value in summary["ratios"].items()]
    seconds = [[name, value] for name, value in summary["seconds"].items()]
    return write_report(
        output / "report.html",
        "From many steps to one, on handwritten digits",
        Section(
            "What was done",
            [
                "A class-conditional flow model (the teacher) was trained on the 1,797 digits of scikit-learn. It was "
                "then distilled by itself, from the same data, into a flow map (the student): a network that jumps "
                "between any two times in one call, trained by Lagrangian self-distillation. Both draw 1,797 images of "
                "the same classes from the same noise, and each set is compared with the real one.",
                _finding(summary),
            ],
        ),
        Section(
            "Quality against network calls",
            [
                Figure(
                    _plot(results, halves),
                    "Frechet distance to the real digits; lower is better. Both axes are logarithmic.",
                ),
                Table(columns, rows, aside=[len(rows) - 1]),
                "The distance of two real halves is that of two sets of 898 images, the mean of eight divisions; it "
                "shows what chance alone makes of it. Every other row compares 1,797 images with 1,797.",
                Table(["comparison", Column("measured"), "aim"], ratios),
            ],
        ),
        Section(
            "Images",
            [
                "Columns share class and noise; the first row of each block is the first image of its class.",
                Gallery(_grids(output)),
            ],
        ),
        Section("Why guidance raises the distance here", _why(results)),
        Section("Use the models", [Code(load_lines(output)), Table(["part", Column("seconds", digits=4)], seconds)]),
        Section("Protocol", [ProtocolBlock({**summary["protocol"], "guiders": ", ".join(GUIDERS), "seed": SEED})]),
        subtitle="genkit demo",
    )


def _finding(summary: dict[str, Any]) -> str:
    row = {r["key"]: r for r in summary["rows"]}
    one, many, euler = row["student-1"], row["teacher-32"], row["teacher-1"]
    return (
        f"One call of the student reaches a Frechet distance of {one['frechet_distance']:.1f}; the teacher needs 32 "
        f"calls for {many['frechet_distance']:.1f} and reaches {euler['frechet_distance']:.1f} with one."
    )


def _why(results: dict[Setting, Result]) -> list:
    blocks: list = [
        "Guidance pushes every image further in the direction that tells its class from the others. It pays where the "
        "model alone is unsure of the class, or where one typical image is wanted. The Frechet distance asks for "
        "something else: the same spread of images as in the data. This model already draws the class it is asked for, "
        "so guidance has little to mend and what it changes is the spread: images move towards the typical, which "
        "shows as lower recall, and away from the real distribution, which shows as a higher distance. A guided model "
        "that looks better and measures worse is no contradiction.",
        "Projected guidance (APG) removes the part of the push that only makes an image stronger, and limits the rest.",
    ]
    for n in (8, 32):
        rows = []
        for s, r in results.items():
            if s.model == "teacher" and s.steps == n:
                rows.append(
                    [s.title, int(r.nfe or 0), *(r.values[k] for k in ("frechet_distance", "class_accuracy", "recall"))]
                )
        blocks.append(Table(["setting", "network calls", "Frechet distance", "class accuracy", "recall"], rows))
    return blocks


def _grids(output: Path) -> list[ImageGrid]:
    labels = Digits().labels
    first = torch.cat([(labels == c).nonzero()[:4, 0] for c in range(10)]).view(10, 4).T.flatten()
    grids = [ImageGrid(to_uint8(Digits().images[first]), "real")]
    shown = [Setting("teacher", 32), Setting("teacher", 1), Setting("student", 1), Setting("student", 2)]
    for setting in [*shown, *(s for s in SETTINGS if s.guider and s.steps == 32)]:
        with np.load(output / "samples" / f"{setting.key}.npz") as file:
            grids.append(ImageGrid(torch.from_numpy(file["images"])[first], setting.title))
    return grids


def _plot(results: dict[Setting, Result], halves: float):
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(7, 4))
    axes = figure.add_subplot()
    kinds = {("teacher", None): "o-", ("student", None): "s-", ("teacher", "cfg"): "^--", ("teacher", "apg"): "v--"}
    for (model, guider), style in kinds.items():
        points = [
            (r.nfe, r.values["frechet_distance"])
            for s, r in results.items()
            if s.model == model and (s.guider.partition(":")[0] if s.guider else None) == guider
        ]
        label = model if guider is None else f"{model}, {guider.upper()}"
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(halves, color="grey", linestyle=":", label="two real halves")
    axes.set(xscale="log", yscale="log", xlabel="network calls an image", ylabel="Frechet distance")
    calls = [1, 2, 4, 8, 16, 32, 64]
    axes.set_xticks(calls, map(str, calls))
    distances = [2.5, 5, 10, 20, 40, 80]
    axes.set_yticks(distances, map(str, distances))
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _print(console: Console, summary: dict[str, Any], output: Path, report: Path, seconds: float) -> None:
    table = RichTable("setting", "network calls", "Frechet distance", "class accuracy", "recall")
    for row in summary["rows"]:
        setting = Setting(row["model"], row["steps"], row["guider"])
        cells = (row["network_calls"], row["frechet_distance"], row["class_accuracy"], row["recall"])
        table.add_row(setting.title, *(f"{v:.4g}" for v in cells))
    table.add_row("two real halves", "", f"{summary['real_halves_frechet_distance']:.4g}", "", "")
    console.print(table)
    for name, value in summary["ratios"].items():
        console.print(f"{name}: {value:.3g} ({summary['targets'][name]})", highlight=False)
    console.print(
        f"\nDone in {seconds:.0f} s. To use the student:\n\n{load_lines(output)}\n", highlight=False, markup=False
    )
    console.print(report.resolve(), highlight=False, soft_wrap=True)
