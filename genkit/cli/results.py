"""Commands of ``genkit eval`` on what was measured before."""

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.options import HtmlReport, Mmhm, Silent


def rank_by_mmhm(
    table: Annotated[
        Path,
        typer.Argument(help="Rows, CSV or JSON, or a folder of a sweep: fid, is_mean, clip_score, pick_score."),
    ],
    metrics: Annotated[
        str | None, typer.Option(help="Others than those four: fid,lpips:min,psnr:max (which way is better).")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="By metric, 1 if not named: fid=2,clip_score=0.5.")] = None,
    eps: Annotated[float, typer.Option(help="Added to each normalised metric; as published by default.")] = 1e-3,
    bounds: Annotated[
        Path | None, typer.Option(help="JSON of an earlier call, whose bounds to take instead of this table's.")
    ] = None,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Keep rows outside of given bounds at them.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Rank rows of different protocols together; the result says so.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write ranking, bounds and notes here.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the ranked rows here.")] = None,
    html_path: HtmlReport = None,
    quiet: Silent = False,
) -> None:
    """Rank the settings in a results table by MMHM, with bounds, stability, Pareto front and ties."""
    from genkit.eval.selection import main

    main(
        table,
        metrics=metrics,
        weights=weights,
        eps=eps,
        bounds=bounds,
        clip=clip,
        force=force,
        json_path=json_path,
        csv_path=csv_path,
        html_path=html_path,
        quiet=quiet,
    )


def score_geneval(
    detections: Annotated[Path, typer.Argument(help="JSON or .jsonl: a prompt's metadata and what was detected.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write scores and every verdict here.")] = None,
    quiet: Silent = False,
) -> None:
    """Score a detector's findings by GenEval's rules."""
    from genkit.eval.geneval import main

    main(detections, json_path=json_path, quiet=quiet)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluations or sweeps, JSON files of results.")],
    html_path: Annotated[Path, typer.Option("--html", help="Write the page here.")],
    metrics: Annotated[str | None, typer.Option(help="Which to show, in this order: fid,kid. All by default.")] = None,
    mmhm: Mmhm = None,
    title: Annotated[str | None, typer.Option(help="What the page is called.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Show runs of different protocols together; the page says so.")
    ] = False,
    quiet: Silent = False,
) -> None:
    """Compare evaluations on one self-contained HTML page: winners, plots, correlations, images and the protocol."""
    from genkit.eval.page import main

    main(runs, html_path, metrics=metrics, mmhm=mmhm, title=title, force=force, quiet=quiet)


def correlate(
    tables: Annotated[list[Path], typer.Argument(help="CSV or JSON tables, folders of evaluations or sweeps.")],
    metrics: Annotated[str | None, typer.Option(help="Which: fid,is,mmhm. All that are there by default.")] = None,
    mmhm: Mmhm = None,
    method: Annotated[str, typer.Option(help="pearson, or spearman: that of ranks.")] = "pearson",
    force: Annotated[
        bool, typer.Option("--force", help="Correlate rows of different protocols; the result says so.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write matrix and notes here.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the matrix here.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a coloured matrix here.")] = None,
    quiet: Silent = False,
) -> None:
    """Print how far metrics, and MMHM, agree over the rows of results."""
    from genkit.eval.correlate import main

    main(
        tables,
        metrics=metrics,
        mmhm=mmhm,
        method=method,
        force=force,
        json_path=json_path,
        csv_path=csv_path,
        html_path=html_path,
        quiet=quiet,
    )
