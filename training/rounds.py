"""Self-play in rounds: fakes from a reference, students trained against them, the best one the next reference."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from genkit.adapters import fuse
from genkit.eval.processes import alone
from genkit.registry import unknown
from genkit.rng import hash_seed
from genkit.training import checkpoint, machine
from genkit.training.adapters import base_network
from genkit.training.build import Run, build
from genkit.training.config import TrainConfig
from genkit.training.export import save_pipeline
from genkit.training.fakes import save_whole, write_fakes
from genkit.training.logs import flatten
from genkit.training.objectives.base import DivergedError
from genkit.training.samples import check_steps
from genkit.training.scores import Score
from genkit.training.sections import Model, Named
from genkit.training.trainer import Trainer
from genkit.training.validation import validate

logger = logging.getLogger("genkit.training")

STATE = "rounds.json"
_BEST = "best.safetensors"
_SCORES = "scores.json"
# Settings that may change when a run is taken up again, beside the number of rounds.
_OPERATIONAL = {"output_dir", "resume", "report_to", "logging_dir", "tracker_project_name", "logging_steps"}
_OPERATIONAL |= {"checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers"}


def check(config: TrainConfig) -> None:
    """Refuse rounds that cannot be run.

    Raises:
        ValueError: no pretrained model, a teacher, a setting in the grid that the objective does not have or refuses.
    """
    assert config.rounds is not None
    if config.model.pretrained is None:
        raise ValueError("rounds: the first reference is model.pretrained, which is not set")
    if config.teacher is not None:
        raise ValueError(f"teacher={config.teacher!r}: rounds make their references themselves, from model.pretrained")
    objective = config.objective_config()
    online = getattr(objective, "fakes", "stored") == "online"
    if online != (config.rounds.num_fakes is None):
        raise ValueError(
            f"rounds.num_fakes={config.rounds.num_fakes}: objective={config.objective.name!r} "
            + ("draws fakes itself, accepted is null" if online else "needs fakes, accepted is their number")
        )
    accepted = type(objective).model_fields
    for name, values in config.rounds.grid.items():
        if name not in accepted:
            raise ValueError(unknown("rounds.grid: setting of the objective", name, accepted))
        if not values:
            raise ValueError(f"rounds.grid.{name} is empty; give the values to try")
    for point in _points(config):
        validate(config.objective_class().Config, config.objective.settings | point, "objective")


def self_play(config: TrainConfig, *, quiet: bool = False) -> Path:
    """Run the rounds of ``config``, or go on with them; returns the pipeline folder of the last reference.

    A round ends early where no student scores better than its reference; rounds end there too. Whatever was finished
    when a run is stopped or killed is not done again: ``resume=latest`` gives what an undisturbed run gives, bit for
    bit on a CPU. ``rounds.json`` in ``output_dir`` reports every score of every student.

    Raises:
        ValueError: rounds are there and ``resume`` is not set, or they were run with other settings.
        Stopped, CheckpointError: as :class:`genkit.training.trainer.Trainer`.
    """
    return _SelfPlay(config, quiet).run()


def _points(config: TrainConfig) -> list[dict[str, Any]]:
    assert config.rounds is not None
    grid = config.rounds.grid
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


class _SelfPlay:
    """One folder of rounds: ``round-<n>/fakes``, ``round-<n>/student-<i>``, ``round-<n>/promoted``."""

    def __init__(self, config: TrainConfig, quiet: bool):
        assert config.rounds is not None and config.model.pretrained is not None
        self.config, self.rounds, self.quiet = config, config.rounds, quiet
        self.state = self._take_up()
        made = self.machine = machine.accelerator(config, find_unused=False)
        if made.distributed_type not in machine._WHOLE:
            raise ValueError(f"rounds: distributed_type={made.distributed_type.value} shards what is sampled; use DDP")
        self.device = made.device
        base = build(self._recipe(1))  # on the data as they are
        check_steps(base, self.rounds, "rounds")
        self.data = Named(name=config.data.name, **base.source.config.model_dump(mode="json", exclude_unset=True))
        self.score = Score(base.source, self.rounds, hash_seed(config.seed, *b"score"))

    def run(self) -> Path:
        for n in range(1, self.rounds.count + 1):
            if not self._round(n):
                logger.warning(
                    "round %d: no student scores better than its reference (%g); rounds end here",
                    n,
                    self.state["rounds"][-1]["reference_score"],
                )
                break
        target = self.config.output_dir / "pipeline"
        if self.machine.is_main_process:
            _copy(Path(self._reference(len(self._promoted()) + 1)), target)
        self.machine.wait_for_everyone()
        return target

    # -- a round ---------------------------------------------------------------------------------------------------

    def _round(self, n: int) -> bool:
        """Bring round ``n`` to its end; whether one of its students became a reference."""
        if n > len(self.state["rounds"]):
            self.state["rounds"].append({"round": n, "reference": self._reference(n), "students": []})
        entry = self.state["rounds"][n - 1]
        if "reference_score" not in entry:
            entry["reference_score"] = self._prepare(n)
            self._save()
        for i, point in enumerate(_points(self.config)):
            if i == len(entry["students"]):
                entry["students"].append(self._train(n, i, point))
                self._save()
            self._discard(self._folder(n, i))
        if "promoted" not in entry:
            better = [s for s in entry["students"] if "score" in s and s["score"] < entry["reference_score"]]
            best = min(better, key=lambda student: student["score"], default=None)
            if best is not None:
                self._promote(n, best)
            entry["promoted"] = None if best is None else best["student"]
            self._save()
        return entry["promoted"] is not None

    def _prepare(self, n: int) -> float:
        """The round's fakes, and the score of its reference."""
        run = self._ready(build(self._recipe(n)))
        if self.rounds.num_fakes is not None:
            write_fakes(
                run,
                self._fakes(n),
                self.rounds.num_fakes,
                seed=hash_seed(self.config.seed, n, *b"fakes"),
                num_inference_steps=self.rounds.num_inference_steps,
                batch_size=self.rounds.batch_size,
                device=self.device,
                rank=self.machine.process_index,
                world_size=self.machine.num_processes,
                quiet=self.quiet,
            )
            self.machine.wait_for_everyone()
        return self._measure(run)

    def _train(self, n: int, i: int, point: dict[str, Any]) -> dict[str, Any]:
        """Train one student and keep its best averaged weights; what the report says of it."""
        folder = self._folder(n, i)
        trainer = Trainer(build(self._recipe(n, i, point)), quiet=self.quiet)
        file = folder / _SCORES
        scores: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

        def evaluate(step: int) -> None:
            if (step % self.rounds.evaluate_every and step != self.config.max_train_steps) or str(step) in scores:
                return
            with trainer.averaged(), trainer.autocast():
                value = self._measure(trainer.run)
                if self.machine.is_main_process and value < min(scores.values(), default=float("inf")):
                    # First, so that a student whose score is known has its weights there.
                    save_whole(dict(trainer.roles["student"].parameters), folder / _BEST)
            scores[str(step)] = value
            if self.machine.is_main_process:
                _write(file, scores)

        entry: dict[str, Any] = {"student": i, "settings": point, "scores": scores}
        try:
            if trainer.step:  # stopped between the checkpoint and its score
                evaluate(trainer.step)
            trainer.train(evaluate)
        except DivergedError as error:
            entry["stopped"] = str(error)
            logger.warning("round %d, student %d (%s): %s", n, i, point, error)
        if scores:
            best = min(scores, key=lambda step: scores[step])
            entry |= {"score": scores[best], "step": int(best)}
            logger.info("round %d, student %d (%s): best score %g at step %s", n, i, point, scores[best], best)
        return entry

    def _promote(self, n: int, best: dict[str, Any]) -> None:
        """Write the best student as the pipeline that the next round starts from, low-rank updates merged."""
        if self.machine.is_main_process:
            i = best["student"]
            run = build(self._recipe(n, i, best["settings"]))
            weights = dict(run.student.module.named_parameters())
            with torch.no_grad():
                for name, tensor in load_file(self._folder(n, i) / _BEST).items():
                    weights[name].copy_(tensor)
            fuse(base_network(run.student))
            temporary = self._folder(n) / ".writing-promoted"
            save_pipeline(run, temporary)
            shutil.rmtree(self._folder(n) / "promoted", ignore_errors=True)  # of a run killed just after this
            os.replace(temporary, self._folder(n) / "promoted")
        self.machine.wait_for_everyone()

    # -- parts -----------------------------------------------------------------------------------------------------

    def _recipe(self, n: int, i: int | None = None, point: dict[str, Any] | None = None) -> TrainConfig:
        """Settings of student ``i`` of round ``n``, which sees the same data in the same order as the others."""
        data = self.config.data
        if i is not None and self.rounds.num_fakes is not None:
            data = Named(name="with_fakes", real=self.data.model_dump(), fakes=str(self._fakes(n)))  # type: ignore
        changes = dict(
            output_dir=self._folder(n, i),
            seed=hash_seed(self.config.seed, n),
            model=Model(pretrained=self._reference(n)),
            objective=Named(name=self.config.objective.name, **(self.config.objective.settings | (point or {}))),
            data=data,
            resume="latest",
            rounds=None,
        )
        return self.config.model_copy(update=changes)

    def _folder(self, n: int, i: int | None = None) -> Path:
        folder = self.config.output_dir / f"round-{n}"
        return folder if i is None else folder / f"student-{i}"

    def _fakes(self, n: int) -> Path:
        return self._folder(n) / "fakes"

    def _reference(self, n: int) -> str:
        """The pipeline that round ``n`` starts from."""
        return str(self._folder(n - 1) / "promoted") if n > 1 else str(self.config.model.pretrained)

    def _promoted(self) -> list[dict[str, Any]]:
        return [entry for entry in self.state["rounds"] if entry.get("promoted") is not None]

    def _ready(self, run: Run) -> Run:
        run.pipe.to(self.device)
        run.objective.to(self.device)
        return run

    def _measure(self, run: Run) -> float:
        with alone():  # the other processes wait
            value = [self.score(run, self.device) if self.machine.is_main_process else 0.0]
        if self.machine.num_processes > 1:
            broadcast_object_list(value)
        return value[0]

    def _discard(self, folder: Path) -> None:
        """The checkpoints of a student that is done: its best weights are what counts."""
        if self.machine.is_main_process:
            for path in checkpoint.found(folder).values():
                shutil.rmtree(path, ignore_errors=True)

    # -- the state -------------------------------------------------------------------------------------------------

    def _take_up(self) -> dict[str, Any]:
        config, file = self.config, self.config.output_dir / STATE
        settings = config.model_dump(mode="json")
        if config.resume not in (None, "latest"):
            raise ValueError(f"resume={config.resume!r}: rounds go on from where they are; accepted is 'latest'")
        if not file.is_file():
            return {"config": settings, "rounds": []}
        if config.resume is None:
            raise ValueError(
                f"output_dir={str(config.output_dir)!r} holds rounds; set resume=latest to go on with them, or another "
                "output_dir"
            )
        state = json.loads(file.read_text())
        old, new = flatten(state["config"]), flatten(settings)
        changed = [
            f"{k} ({old.get(k)} -> {new.get(k)})"
            for k in sorted({*old, *new})
            if old.get(k) != new.get(k) and k.split(".")[0] not in _OPERATIONAL and k != "rounds.count"
        ]
        if changed:
            raise ValueError(f"{file} was begun with other settings, so its rounds would not fit: {', '.join(changed)}")
        return state

    def _save(self) -> None:
        if self.machine.is_main_process:
            self.config.output_dir.mkdir(parents=True, exist_ok=True)
            _write(self.config.output_dir / STATE, self.state)


def _write(file: Path, value: Any) -> None:
    """JSON that is whole whenever the file has its name."""
    temporary = file.with_name(f".writing-{file.name}")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _copy(folder: Path, target: Path) -> None:
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(folder, temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
