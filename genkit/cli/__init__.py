"""The ``genkit`` command. Each sub-command imports what it needs when it is called, so that ``--help`` is instant."""

import shlex
import sys
from typing import Annotated

import typer

from genkit.cli.about import cite, doctor
from genkit.cli.adapters import mix
from genkit.cli.evaluation import evaluate, explain_difference, features
from genkit.cli.results import correlate, rank_by_mmhm, report, score_geneval
from genkit.cli.sampling import pairs, sample
from genkit.cli.sweeps import sweep, watch
from genkit.cli.training import demo, distill, train

# Commands in the order in which --help lists them.
COMMANDS = {
    "demo": demo,
    "train": train,
    "distill": distill,
    "sample": sample,
    "pairs": pairs,
    "doctor": doctor,
    "cite": cite,
}
EVAL_COMMANDS = {
    "run": evaluate,
    "features": features,
    "mmhm": rank_by_mmhm,
    "geneval": score_geneval,
    "report": report,
    "correlate": correlate,
    "doctor": explain_difference,
    "sweep": sweep,
    "watch": watch,
}
ADAPTERS_COMMANDS = {"mix": mix}


def _version(asked: bool) -> None:
    if asked:
        import genkit

        typer.echo(genkit.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...


def _group(commands: dict, **settings) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, **settings)
    for name, function in commands.items():
        group.command(name)(function)
    return group


app = _group(
    COMMANDS,
    name="genkit",
    help="Guidance, samplers, few-step distillation and fair evaluation for diffusion and flow models.",
    callback=_root,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(_group(EVAL_COMMANDS, help="Measure and compare generated images."), name="eval")
app.add_typer(_group(ADAPTERS_COMMANDS, help="Scale and mix LoRAs, or SaRAs, after training."), name="adapters")


def main() -> None:
    """Run the command; what a user can mend is one message, without a trace."""
    try:
        app(obj=shlex.join(["genkit", *sys.argv[1:]]))  # results keep the line that was typed
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
