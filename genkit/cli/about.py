"""Commands that tell what is installed and whom to cite."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pipeline or network: also say where backends reach its attention.")
    ] = None,
) -> None:
    """Print versions, devices, attention backends, and what is missing with the command that installs it."""
    from rich.console import Console
    from rich.table import Table

    from genkit import doctor as checks

    if model is not None:
        checks.check_model(model)
    console = Console()
    problem = checks.torchvision_problem()

    def show(title: str, columns: tuple[str, ...], rows) -> None:
        table = Table(title=title, title_justify="left")
        if not any(row[-1] for row in rows):
            columns = columns[:-1]
        for name in columns:
            table.add_column(name, overflow="fold")  # names in full, on as many lines as they take
        for row in rows:
            table.add_row(*map(str, row[: len(columns)]))
        console.print(table)

    show("Packages", ("package", "version", "remark"), [(p, v or "missing", why) for p, v, why in checks.versions()])
    show("Devices", ("device", "what it is"), checks.devices())
    backends = [(name, "yes" if works else "no", remark) for name, works, remark in checks.attention_backends()]
    show("Attention", ("backend", "works", "remark"), backends)
    if model is not None:
        rows = checks.model_attention(model)
        show(f"Attention of {model}", ("module", "class", "processor", "reached", "remark"), rows)
    if problem:
        console.print(problem, style="red")
        raise typer.Exit(1)


def cite(target: Annotated[str, typer.Argument(help="A method (apg, flow_map ...) or the folder of a run.")]) -> None:
    """Print the BibTeX of a method, or of everything that a run used."""
    from genkit.cite import bibtex

    typer.echo(bibtex(target), nl=False)
