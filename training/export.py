"""What was trained, in the form in which it is used and shared."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from genkit.adapters import fused
from genkit.denoisers import TwoTime
from genkit.hub import save_flow_map
from genkit.training.adapters import base_network, save_lora, save_sara
from genkit.training.build import Run, build
from genkit.training.card import write_card
from genkit.training.roles import TrainedRole
from genkit.training.saving import load_averages
from genkit.training.sharding import is_sharded
from genkit.training.trainer import Trainer


def export(trainer: Trainer) -> Path:
    """Write the student with its averaged weights; returns the folder.

    A two-time student of a Diffusers network: ``flow_map/``, for :func:`genkit.hub.load_flow_map`. A LoRA: ``lora/``,
    for ``pipe.load_lora_weights``; a SaRA: ``sara/``, for ``load_adapter`` of genkit's pipelines. Anything else, and
    whatever a method has a pipeline of its own for: ``pipeline/``, a Diffusers pipeline folder with a model card, and
    with the adapter of a network of two times fused, since more was trained than it. Where the student is frozen, the
    trained role in its place: a folder of its name, for the ``from_pretrained`` of its class.
    """
    run = trainer.run
    output_dir = run.config.output_dir
    (role, *_) = trainer.roles.values()
    if is_sharded(list(role.parameters.values())):
        run = _whole_run(trainer, role)
    module = run.objective.roles[role.name].module
    if module is not run.student.module:
        with role.ema.swapped() if role.ema is not None and run is trainer.run else nullcontext():
            module.save_pretrained(output_dir / role.name)  # type: ignore[operator]
        return output_dir / role.name
    with trainer.averaged() if run is trainer.run else nullcontext():
        if isinstance(run.student, TwoTime):
            name = "default" if run.config.adapter.kind == "lora" else None
            return save_flow_map(output_dir / "flow_map", run.student, adapter_name=name)
        own = run.objective.pipeline(run.pipe)
        if own is not None:
            own.save_pretrained(output_dir / "pipeline")
            write_card(output_dir / "pipeline", run.config)
            return output_dir / "pipeline"
        if run.config.adapter.kind != "full" and not run.objective.needs_flow_map:
            save = save_lora if run.config.adapter.kind == "lora" else save_sara
            return save(run.student, output_dir / run.config.adapter.kind)
        save_pipeline(run, output_dir / "pipeline")
        write_card(output_dir / "pipeline", run.config)
    return output_dir / "pipeline"


def save_pipeline(run: Run, folder: Path) -> None:
    """Write the pipeline of the student, its adapter fused, with the scheduler that its objective samples it with."""
    network = base_network(run.student)
    parts: dict[str, Any] = {}
    if run.pipe.components.get("scheduler") is not None:
        parts["scheduler"] = run.objective.scheduler(run.pipe.scheduler)
    whole = fused(network)
    if whole is not network:
        (name,) = (name for name, part in run.pipe.components.items() if part is network)
        parts[name] = whole
    before = {name: run.pipe.components[name] for name in parts}
    run.pipe.register_modules(**parts)
    try:
        run.pipe.save_pretrained(folder)
    finally:
        run.pipe.register_modules(**before)


def _whole_run(trainer: Trainer, role: TrainedRole) -> Run:
    """The run made anew on this process, with the weights of the last checkpoint: those in memory are shards."""
    config = trainer.run.config
    run = build(config)
    folder = config.output_dir / f"checkpoint-{trainer.step}"
    load_averages(run.objective.roles[role.name].module, folder, role.name, next(iter(config.ema.decays), None))
    return run
