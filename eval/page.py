"""``genkit eval report``: evaluations compared on one page that can be sent to a colleague."""

from collections.abc import Sequence
from pathlib import Path

from genkit.eval import page_sections as say
from genkit.eval.blocks import Commands
from genkit.eval.comparison import Comparison, compare
from genkit.eval.correlate import FEW
from genkit.eval.page_images import class_blocks, code_blocks, extreme_blocks, first_blocks
from genkit.eval.report import Code, Section, write_report
from genkit.eval.reproduce import install, report_command, run_commands
from genkit.eval.runs import read_runs
from genkit.eval.selection import parse_metrics


def main(
    paths: Sequence[str | Path],
    html_path: str | Path,
    *,
    metrics: str | None = None,
    mmhm: str | None = None,
    title: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Path:
    """Compare the runs of ``paths`` (:func:`genkit.eval.runs.read_runs`) on the page ``html_path``; see ``compare``.

    The same runs give the same bytes.
    """
    if not Path(html_path).absolute().parent.is_dir():
        raise ValueError(f"{html_path}: the folder {Path(html_path).absolute().parent} does not exist")
    if Path(html_path).resolve() in {Path(path).resolve() for path in paths}:
        raise ValueError(f"{html_path}: the page would overwrite what it is made from")
    chosen = None if metrics is None else metrics.split(",")
    runs, notes = read_runs(paths)
    made = compare(runs, metrics=chosen, mmhm=None if mmhm is None else parse_metrics(mmhm), force=force, notes=notes)
    command = report_command(paths, html_path, metrics=metrics, mmhm=mmhm, title=title, force=force)
    name = title or (f"{len(runs)} settings compared" if len(runs) > 1 else runs[0].name)
    path = write_report(html_path, name, *sections(made, command), subtitle=say.subtitle(made))
    if not quiet:
        from rich.console import Console

        Console().print(path.resolve(), highlight=False, soft_wrap=True)
    return path


def sections(made: Comparison, command: str) -> list[Section]:
    """The page."""
    found = [Section("Summary", say.summary(made))]
    if made.ranking is not None:
        found.append(Section("MMHM", say.mmhm(made, made.ranking)))
    found += say.plots(made)
    if len(made.runs) >= FEW:
        found.append(Section("Correlations", say.correlations(made)))
    for name, blocks in (
        ("Images", first_blocks(made.runs)),
        ("Worst and best", extreme_blocks(made.runs)),
        ("Codes", code_blocks(made.runs, 100)),
        ("Classes", class_blocks(made.runs)),
    ):
        if blocks:
            found.append(Section(name, blocks))
    found.append(Section("Notes", say.notes(made)))
    found.append(Section("Protocol", say.protocol(made)))
    commands = [("This page", Code(command)), *run_commands(made.runs), ("The environment", Code(install(made.runs)))]
    return [*found, Section("Reproduce", [Commands(commands)])]
