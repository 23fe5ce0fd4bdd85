"""``genkit eval watch``: evaluate the checkpoints of a training as they come, in a process beside it."""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from genkit.eval.asked import Asked, matched
from genkit.eval.by_name import several_steps
from genkit.eval.directions import better
from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import ImageSet
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.processes import rank_and_count
from genkit.eval.run import NoImages, evaluate, measure
from genkit.eval.sources import open_set
from genkit.step_annealing import StepAnnealer, as_written
from genkit.training import checkpoint
from genkit.training.build import Run, build
from genkit.training.config import TrainConfig
from genkit.training.saving import load_averages
from genkit.training.student_images import student_images

logger = logging.getLogger("genkit.training")

FILE, BEST = "evaluation.jsonl", "evaluation_best.json"
_EXPORTS = ("pipeline", "flow_map", "lora", "sara")


class Gone(Exception):
    """A checkpoint is not, or no longer, there as a whole."""


class Watch:
    """Evaluates each checkpoint in ``run_dir`` once, with the averaged weights, at each number of ``steps``; by default
    at that of the recipe's samples.

    Results are lines of ``evaluation.jsonl``: step, ``num_inference_steps``, values, network calls, notes and protocol.
    The best by ``best``, a value's name, is in ``evaluation_best.json``.

    Args:
        run_dir: the ``output_dir`` of a training.
        reference: what ``evaluate`` takes; the student is asked for its labels or prompts, each as often as there.
        metrics, extractor, n, seed, batch_size, device: as ``evaluate`` has them.
        best: by default the first value that is better one way.

    Raises:
        ValueError: settings that are not accepted, or a file of evaluations with other ones.
        FileNotFoundError: no such folder or reference.
    """

    def __init__(
        self,
        run_dir: str | Path,
        reference: Any,
        *,
        steps: Sequence[int | StepAnnealer] = (),
        metrics: Sequence[str] | None = None,
        extractor: str = "digits",
        n: int | None = None,
        seed: int = 0,
        best: str | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ):
        self.run_dir, self.seed = Path(run_dir), seed
        self.steps: list[int | StepAnnealer | None] = list(dict.fromkeys(steps)) or [None]
        if not self.run_dir.is_dir():
            raise FileNotFoundError(f"run_dir={str(run_dir)!r}: no such folder")
        if rank_and_count()[1] > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("watch evaluates on one process; start it without a launcher")
        for name, values, least in (
            ("steps", steps, 1),
            ("batch_size", [batch_size], 1),
            ("n", [2 if n is None else n], 2),
        ):
            for value in values:
                if isinstance(value, int) and value < least:
                    raise ValueError(f"{name}={value}: must be at least {least}")
        if best is not None and better(best) is None:
            raise ValueError(f"best={best!r}: of no value of this name is it known which way it is better")
        self.best, self.batch_size, self.device = best, batch_size, torch.device(device)
        self.extractor = get_extractor(extractor)
        self.metrics = None if metrics is None else [get_metric(metric) for metric in metrics]
        side = open_set(reference, "reference", self.extractor, n, seed, False)
        self.settings = {
            "reference": side.name if isinstance(side, ImageSet) else side.stats.meta.get("source"),
            "n": side.n,
            "extractor": self.extractor.id,
            "metrics": None if self.metrics is None else {m.name: m.settings for m in self.metrics},
            "seed": seed,
        }
        self.rows = _read(self.run_dir / FILE)
        for row in self.rows:
            differing = [key for key, value in _plain(self.settings).items() if row["settings"].get(key) != value]
            if differing:
                told = "; ".join(f"{k} was {row['settings'].get(k)!r}, now {self.settings[k]!r}" for k in differing)
                raise ValueError(f"{self.run_dir / FILE} holds evaluations with other settings ({told}); rename it")
        self._side: ImageSet | FeatureSet = side
        self.real: FeatureSet | None = None if isinstance(side, ImageSet) else side
        self._run: tuple[dict[str, Any], Run] | None = None
        self._told: set[str] = set()  # notes, each logged once

    # -- the checkpoints -----------------------------------------------------------------------------------------

    @property
    def pending(self) -> list[tuple[int, Path, int | StepAnnealer | None]]:
        """What is there and not evaluated: step, folder and number of inference steps, oldest first."""
        done = {(row["step"], row["num_inference_steps"]) for row in self.rows}
        there = checkpoint.found(self.run_dir).items()
        return [(step, path, k) for step, path in there for k in self.steps if (step, as_written(k)) not in done]

    def once(self) -> list[dict[str, Any]]:
        """Evaluate what is pending; a checkpoint that goes away meanwhile is left out. Returns the new rows."""
        new = []
        for step, path, k in self.pending:
            try:
                row = self._evaluate(step, path, k)
            except Gone as error:
                logger.warning("checkpoint-%d is left out: %s", step, error)
                continue
            except NoImages as error:
                row = self._row(step, path, k, {"values": {}, "nfe": None, "notes": [str(error)]})
                logger.warning("checkpoint-%d: %s", step, error)
            self._append(row)
            new.append(row)
            values = ", ".join(f"{name} {value:.5g}" for name, value in row["values"].items() if better(name))
            logger.info("step %d, %s inference steps: %s", step, row.get("made_with", {}).get("steps"), values)
            for note in row["notes"]:
                if note not in self._told:
                    logger.info("note: %s", note)
            self._told.update(row["notes"])
        return new

    def finished(self) -> bool:
        """Whether the training has ended: its last step is there, or what it exports after that."""
        there = checkpoint.found(self.run_dir)
        if not there:
            return False
        step, path = max(there.items())
        try:
            manifest = checkpoint.read_manifest(path)
            written = (path / checkpoint.MANIFEST).stat().st_mtime
        except (OSError, checkpoint.CheckpointError):
            return False
        exports = [self.run_dir / name for name in _EXPORTS if (self.run_dir / name).is_dir()]
        return step >= manifest["config"]["max_train_steps"] or any(e.stat().st_mtime > written for e in exports)

    def follow(self, poll: float) -> None:
        """Evaluate what comes until the training has ended, looking every ``poll`` seconds."""
        if not checkpoint.found(self.run_dir):
            logger.info("no checkpoint in %s yet; looking every %g seconds", self.run_dir, poll)
        while True:
            ended = self.finished()  # asked first: what was written before the end is then evaluated
            self.once()
            if ended:
                return
            time.sleep(poll)

    def _evaluate(self, step: int, path: Path, k: int | StepAnnealer | None) -> dict[str, Any]:
        run = self._load(path)
        name = f"{self.run_dir.name}/{path.name}"
        if self.real is None:
            assert isinstance(self._side, ImageSet)
            self.real = measure(self._side, self.extractor, batch_size=self.batch_size, device=self.device, quiet=True)
        images = student_images(
            run, self._asked, k, seed=self.seed, batch_size=self.batch_size, device=self.device, name=name
        )
        result = evaluate(
            self.real,
            images,
            metrics=self.metrics,
            extractor=self.extractor,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
            made_with={"training_step": step},
            quiet=True,
        )
        return self._row(step, path, k, result.model_dump(mode="json"))

    def _row(self, step: int, path: Path, k: int | StepAnnealer | None, found: dict[str, Any]) -> dict[str, Any]:
        return {
            "step": step,
            "checkpoint": path.name,
            "num_inference_steps": as_written(k),
            **found,
            "settings": self.settings,
        }

    @property
    def _asked(self) -> Asked:
        side = self._side
        if isinstance(side, FeatureSet):
            if side.n is None:
                raise ValueError("the reference statistics do not say how many images they are of")
            side = ImageSet("reference", side.n, lambda indices: torch.empty(0), side.labels, side.prompts)
        return matched(side)

    def _load(self, path: Path) -> Run:
        """The run with the averaged weights of a checkpoint."""
        try:
            manifest = checkpoint.read_manifest(path)
            made = manifest["config"]
            if self._run is None or self._run[0] != made:
                config = TrainConfig.model_validate({**made, "resume": None})
                run = build(config)
                run.pipe.to(self.device)
                run.objective.to(self.device)
                self._run = (made, run)
            load_student(self._run[1], path)
        except (OSError, SafetensorError, checkpoint.CheckpointError) as error:
            if (path / checkpoint.MANIFEST).is_file():
                raise
            raise Gone(str(error)) from error
        return self._run[1]

    # -- the files ----------------------------------------------------------------------------------------------

    def _append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with (self.run_dir / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        names = [name for name in row["values"] if better(name)] if self.best is None else [self.best]
        if not row["values"] or not names:
            return
        if names[0] not in row["values"]:
            raise ValueError(f"best={self.best!r}: the values are {', '.join(row['values'])}")
        known = [r for r in self.rows if math.isfinite(float(r["values"].get(names[0], math.nan)))]
        if not known:
            return
        sign = 1 if better(names[0]) == "lower" else -1
        first = min(known, key=lambda r: (sign * float(r["values"][names[0]]), r["nfe"] or 0, r["step"]))
        told = {k: first[k] for k in ("step", "checkpoint", "num_inference_steps", "nfe")}
        told = {"metric": names[0], "value": first["values"][names[0]], **told}
        partial = self.run_dir / f"{BEST}.partial"
        partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.run_dir / BEST)


def load_student(run: Run, path: Path) -> None:
    """Put the student's weights of a checkpoint into ``run``, averaged (by the first decay) where it has averages.

    Raises:
        ValueError: the method trains other networks than the student.
        OSError, SafetensorError: a file that is missing or not whole.
    """
    module = run.student.module
    roles = [name for name, role in run.objective.roles.items() if role.trains and role.module is module]
    if not roles:
        raise ValueError(f"objective={run.config.objective.name!r} does not train the network that makes images")
    load_averages(module, path, roles[0], next(iter(run.config.ema.decays), None))


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows; a line that a killed process left half-written is cut off."""
    if not file.is_file():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def main(
    run_dir: Path,
    reference: str,
    *,
    steps: str | None = None,
    once: bool = False,
    poll: float = 60,
    quiet: bool = False,
    device: str | None = None,
    **settings: Any,
) -> None:
    """The command: follow the run until it ends or Ctrl-C; ``once``: evaluate what is there.

    Raises:
        ValueError, FileNotFoundError: as :class:`Watch`; with ``once``, a folder without checkpoints.
    """
    if not poll > 0:
        raise ValueError(f"poll={poll}: must be more than 0 seconds")
    counts = [] if steps is None else several_steps(steps)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    watch = Watch(run_dir, reference, steps=counts, device=where, **settings)
    if once and not checkpoint.found(run_dir):
        raise FileNotFoundError(f"{run_dir}: no checkpoint-N below; accepted is the output_dir of a training with one")
    try:
        watch.once() if once else watch.follow(poll)
    except KeyboardInterrupt:
        logger.info("stopped; called again, it goes on")
    if not quiet and (run_dir / BEST).is_file():
        best = json.loads((run_dir / BEST).read_text(encoding="utf-8"))
        k = best["num_inference_steps"]
        told = f"best: {best['metric']} {best['value']:.5g} of {best['checkpoint']}"
        print(f"{told}{'' if k is None else f', {k} inference steps'} ({run_dir / BEST})")
