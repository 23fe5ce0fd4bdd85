"""The trained student in the form in which it is used and shared."""

from pathlib import Path

from genkit.denoisers import TwoTime
from genkit.hub import save_flow_map
from genkit.training.adapters import save_lora
from genkit.training.samples import student_scheduler
from genkit.training.trainer import Trainer


def export(trainer: Trainer) -> Path:
    """Write the student with its averaged weights; returns the folder.

    A two-time student of a Diffusers network: ``flow_map/``, for :func:`genkit.hub.load_flow_map`. A LoRA: ``lora/``,
    for ``pipe.load_lora_weights``. Anything else: ``pipeline/``, a Diffusers pipeline folder.
    """
    run = trainer.run
    output_dir = run.config.output_dir
    with trainer.averaged():
        if isinstance(run.student, TwoTime):
            return save_flow_map(output_dir / "flow_map", run.student)
        if run.config.adapter.kind == "lora":
            return save_lora(run.student, output_dir / "lora")
        before = run.pipe.scheduler
        run.pipe.scheduler = student_scheduler(run)
        try:
            run.pipe.save_pretrained(output_dir / "pipeline")
        finally:
            run.pipe.scheduler = before
    return output_dir / "pipeline"
