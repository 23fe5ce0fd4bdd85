"""Commands of ``genkit eval`` that evaluate one model in many settings or at many steps."""

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.options import (
    Adapters,
    CallArguments,
    Device,
    DType,
    Extractor,
    HtmlReport,
    Intervals,
    ItemSeed,
    MetricNames,
    Mmhm,
    Model,
    Silent,
)

Reference = Annotated[str, typer.Argument(help="Real images: a folder, .npz, saved statistics, or 'digits'.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]


def sweep(
    model: Model,
    reference: Reference,
    output: Annotated[Path, typer.Option(help="Folder for the sweep; one of the same settings goes on.")],
    steps: Annotated[
        str | None,
        typer.Option(
            help="Numbers of steps: 1,2,4,25; of a diffusion head also falling ones: 20,linear:hi=50,lo=5. Needed, but "
            "by networks that draw tokens."
        ),
    ] = None,
    guidance: Annotated[str, typer.Option(help="Guidance scales: 1,1.5,3,7; 1 is no guidance.")] = "1",
    guider: Annotated[
        str | None, typer.Option(help="Guiders, with settings but no scale: cfg,apg:eta=0. By default cfg.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Schedulers, with settings: pndm,DDIMScheduler. By default the pipeline's own.")
    ] = None,
    over: Annotated[
        str,
        typer.Option(
            help="Of networks that draw tokens: more settings, with values: top_k=[0,50],temperature=[0.9,1]."
        ),
    ] = "",
    metrics: MetricNames = None,
    extractor: Extractor = "digits",
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Images a cell, and of the reference; by default all of that.")
    ] = None,
    mmhm: Mmhm = None,
    adapter: Adapters = None,
    arguments: CallArguments = "",
    size: Annotated[int | None, typer.Option(help="Make all images, real and generated, this large.")] = None,
    crop: Annotated[str | None, typer.Option(help="How, with --size: center (default) or squash.")] = None,
    intervals: Intervals = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at what would be a note.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Rank cells of different protocols together; the result says so.")
    ] = False,
    seed: ItemSeed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DType = "float32",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the table here too.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the table here too.")] = None,
    html_path: HtmlReport = None,
    quiet: Silent = False,
) -> None:
    """Evaluate a model at every combination of steps and guidance, and rank them; stopped, it goes on cell by cell.

    Images are made for the labels or prompts of the reference. On several GPUs: `accelerate launch -m genkit.cli eval
    sweep ...`; the processes share each cell.
    """
    from genkit.eval.by_name import split
    from genkit.eval.sweep import main

    main(
        model,
        reference,
        output,
        steps=steps,
        guidance=guidance,
        guider=guider,
        scheduler=scheduler,
        over=over,
        metrics=None if metrics is None else split(metrics),
        extractor=extractor,
        n=n,
        mmhm=mmhm,
        adapters=adapter or [],
        arguments=arguments,
        size=size,
        crop=crop,
        intervals=intervals,
        strict=strict,
        force=force,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        json_path=json_path,
        csv_path=csv_path,
        html_path=html_path,
        quiet=quiet,
    )


def watch(
    run_dir: Annotated[Path, typer.Argument(help="The output_dir of a training, running or ended.")],
    reference: Reference,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Numbers of inference steps: 1,4; of a diffusion head also falling ones: 20,linear:hi=50,lo=5. By "
            "default the recipe's own for samples."
        ),
    ] = None,
    metrics: MetricNames = None,
    extractor: Annotated[str, typer.Option(help="Feature extractor.")] = "digits",
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Images on each side; all of the reference by default.")
    ] = None,
    best: Annotated[str | None, typer.Option(help="The value that the best checkpoint is chosen by.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate what is there, and stop.")] = False,
    poll: Annotated[float, typer.Option("--poll", "--every", help="Seconds between looks.")] = 60.0,
    seed: ItemSeed = 0,
    batch_size: BatchSize = 64,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings alone.")] = False,
) -> None:
    """Evaluate the checkpoints of a training as they come: lines of evaluation.jsonl in its folder, and the best.

    It ends with the training, or on Ctrl-C; called again, it goes on. A checkpoint is evaluated once.
    """
    from genkit.eval.by_name import split
    from genkit.training.watch import main

    main(
        run_dir,
        reference,
        steps=steps,
        metrics=None if metrics is None else split(metrics),
        extractor=extractor,
        n=n,
        best=best,
        once=once,
        poll=poll,
        seed=seed,
        batch_size=batch_size,
        device=device,
        quiet=quiet,
    )
