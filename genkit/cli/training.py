"""Commands that train."""

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.options import Model, Quiet

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: section.key=value.")]


def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, results and the report.")] = Path("outputs/demo"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of resuming or reusing what is there.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a digits flow model, distil it to one step, compare both under guidance, and write an HTML report."""
    from genkit.training.demo import run

    run(output, fresh=fresh, quiet=quiet)


def train(
    config: Annotated[str, typer.Argument(help="YAML recipe, see configs/.")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Replace the recipe's data: 'synthetic' needs none.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train by a recipe. The same as `accelerate launch -m genkit.training CONFIG key=value ...` on one process."""
    from genkit.training.__main__ import main

    extra = (["--data", data] if data else []) + (["--quiet"] if quiet else [])
    raise typer.Exit(main([config, *(overrides or []), *extra]))


def distill(
    teacher: Model,
    method: Annotated[str, typer.Option(help="lsd, meanflow, mdt, apex, dmd2 ...; an unknown one lists them all.")],
    output: Annotated[Path, typer.Option(help="Folder for the run; the student's pipeline is in pipeline/ there.")],
    overrides: Overrides = None,
    adapter: Annotated[str | None, typer.Option(help="lora, sara or full, in place of the recipe's choice.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of pictures, a file with a prompt a line, or a source's name.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of the recipe's.")] = None,
    quiet: Quiet = False,
) -> None:
    """Turn a many-step model into one of few steps: says what it will do, trains, measures, and saves a pipeline."""
    from genkit.training.distill import main

    code = main(
        teacher=teacher,
        method=method,
        output=output,
        adapter=adapter,
        data=data,
        steps=steps,
        overrides=overrides or [],
        quiet=quiet,
    )
    raise typer.Exit(code)
