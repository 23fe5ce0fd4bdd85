"""``python -m genkit.training CONFIG key=value ...``; also under ``accelerate launch -m``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from genkit.training.config import TrainConfig, load_config


def train(config: TrainConfig, *, quiet: bool = False) -> Path:
    """Train what ``config`` says, in rounds where it has any, and export the student; returns the folder it is in.

    Raises:
        ValueError, DivergedError, CheckpointError, Stopped: as :class:`genkit.training.trainer.Trainer`.
    """
    from accelerate import PartialState

    from genkit.training.build import build
    from genkit.training.export import export
    from genkit.training.trainer import Trainer

    try:
        if config.rounds is not None:
            from genkit.training.rounds import self_play

            return self_play(config, quiet=quiet)
        trainer = Trainer(build(config), quiet=quiet)
        trainer.train()
        folder = export(trainer) if trainer.accelerator.is_main_process else config.output_dir
        trainer.accelerator.wait_for_everyone()
        return folder
    finally:
        # Left to the interpreter's end, the threads of a process group abort now and then.
        PartialState().destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status. Errors are one message, not a trace."""
    parser = argparse.ArgumentParser("genkit train", description="Train a model from a YAML recipe.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings that replace the file's")
    parser.add_argument("--data", metavar="NAME", help="replace the data section; 'synthetic' needs no data at all")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, warnings only")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("genkit").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    from genkit.training.interrupt import Stopped
    from genkit.training.objectives.base import DivergedError

    try:
        config = load_config(arguments.config, arguments.overrides, data=arguments.data)
        folder = train(config, quiet=arguments.quiet)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except (ValueError, FileNotFoundError, ImportError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.quiet:
        print(f"saved the trained student in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
