"""The commands of ``genkit adapters``."""

from pathlib import Path
from typing import Annotated

import typer


def mix(
    adapter: Annotated[list[str], typer.Argument(help="FOLDER=WEIGHT; without a weight 1. Several are added up.")],
    output: Annotated[Path, typer.Option(help="Folder for the result, which --adapter takes.")],
    scale: Annotated[float, typer.Option(help="Of the whole; 0 is the base model.")] = 1.0,
) -> None:
    """Add up the updates of several LoRAs, or SaRAs, each with its weight, into one: exactly."""
    from genkit.adapters import mix_adapters, parse_adapter

    typer.echo(mix_adapters([parse_adapter(text) for text in adapter], output, scale=scale))
