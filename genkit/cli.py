"""The ``genkit`` command. Each sub-command imports what it needs when it is called, so that ``--help`` is instant."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from genkit.registry import file_names

app = typer.Typer(
    name="genkit",
    help="Guidance, samplers, few-step distillation and fair evaluation for diffusion and flow models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluation = typer.Typer(help="Measure and compare generated images.", no_args_is_help=True)
app.add_typer(evaluation, name="eval")
adapters = typer.Typer(help="Scale and mix LoRAs, or SaRAs, after training.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")

EXTRACTORS = ", ".join(file_names("genkit.eval.extractors"))

_called: str | None = None  # the command line, where there is one: others may call ``app`` with arguments of their own

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Silent = Annotated[bool, typer.Option("--quiet", help="Print nothing, neither progress nor what was found.")]


def _version(asked: bool) -> None:
    if asked:
        import genkit

        typer.echo(genkit.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...


@app.command()
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


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML recipe, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: section.key=value.")] = None,
    data: Annotated[str | None, typer.Option(help="Replace the recipe's data: 'synthetic' needs none.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train by a recipe. The same as `accelerate launch -m genkit.training CONFIG key=value ...` on one process."""
    from genkit.training.__main__ import main

    extra = (["--data", data] if data else []) + (["--quiet"] if quiet else [])
    raise typer.Exit(main([config, *(overrides or []), *extra]))


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="Folder of a pipeline, genkit's or Diffusers', or owner/name.")],
    method: Annotated[str, typer.Option(help="lsd, meanflow, mdt, apex, dmd2 ...; an unknown one lists them all.")],
    output: Annotated[Path, typer.Option(help="Folder for the run; the student's pipeline is in pipeline/ there.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: section.key=value.")] = None,
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


@app.command()
def sample(
    pipeline: Annotated[str, typer.Argument(help="Folder of a pipeline, genkit's or Diffusers', or owner/name.")],
    output: Annotated[Path, typer.Option(help="Folder for the PNG files, a grid and metadata.jsonl.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Class labels, by number or name, separated by commas; all by default.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="File with a prompt or a label a line, beside those.")] = None,
    num_inference_steps: Annotated[
        str | None,
        typer.Option(
            "--steps",
            help="Steps of the scheduler, the pipeline's own number by default; of a diffusion head also falling ones: "
            "linear:hi=50,lo=5.",
        ),
    ] = None,
    num_images: Annotated[int, typer.Option("--per-label", "--per-prompt", help="Images a label or prompt.")] = 1,
    guider: Annotated[
        str | None, typer.Option(help="Guider by name, with settings: apg:guidance_scale=4,eta=0.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler by name, with settings: pndm, DDIMScheduler:clip_sample=False.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA or SaRA, FOLDER or FOLDER=0.7, which add up; a learned word, FOLDER."),
    ] = None,
    arguments: Annotated[
        str, typer.Option("--set", help="Others of the pipeline's call: height=512,negative_prompt='blurry'.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; does not change them.")] = 64,
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the device only what is computing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Generate images with a saved pipeline; run again, it goes on where it was stopped."""
    from genkit.pipelines.commands import sample_to_folder

    folder = sample_to_folder(
        pipeline,
        output,
        prompts=prompt or [],
        labels=[] if labels is None else labels.split(","),
        inputs=inputs,
        num_inference_steps=num_inference_steps,
        num_images=num_images,
        guider=guider,
        scheduler=scheduler,
        adapters=adapter or [],
        arguments=arguments,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        offload=offload,
        quiet=quiet,
    )
    typer.echo(folder)


@app.command()
def pairs(
    pipeline: Annotated[str, typer.Argument(help="Folder of a pipeline, genkit's or Diffusers', or owner/name.")],
    output: Annotated[Path, typer.Option(help="Folder for the shards and pairs.json.")],
    num: Annotated[int, typer.Option(help="How many pairs.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Class labels, by number or name, separated by commas; all by default.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="File with a prompt or a label a line, beside those.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the scheduler; the pipeline's own number by default.")
    ] = None,
    guider: Annotated[str | None, typer.Option(help="Guider by name, with settings: cfg:guidance_scale=5.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler by name, with settings: pndm, DPMSolverMultistepScheduler.")
    ] = None,
    arguments: Annotated[
        str, typer.Option("--set", help="Others of the pipeline's call: height=512,negative_prompt='blurry'.")
    ] = "",
    reward: Annotated[
        str | None, typer.Option(help="Score the samples, by a reward's name with settings: digits:wanted=3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Pair i depends on (seed, i) alone.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pairs at a time; does not change them.")] = 64,
    shard_size: Annotated[int, typer.Option(help="Pairs a file.")] = 512,
    store_noise: Annotated[
        bool, typer.Option("--store-noise", help="Store the noise too, instead of drawing it again from the seed.")
    ] = False,
    x0_dtype: Annotated[str, typer.Option(help="Samples are stored as float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the device only what is computing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make pairs of noise and a model's samples, scored or not, to train on; run again, it goes on."""
    from genkit.pipelines.pairs import make_pairs, score_summary

    folder = make_pairs(
        pipeline,
        output,
        num=num,
        prompts=prompt or [],
        labels=[] if labels is None else labels.split(","),
        inputs=inputs,
        num_inference_steps=num_inference_steps,
        guider=guider,
        scheduler=scheduler,
        arguments=arguments,
        reward=reward,
        seed=seed,
        batch_size=batch_size,
        shard_size=shard_size,
        store_noise=store_noise,
        x0_dtype=x0_dtype,
        device=device,
        dtype=dtype,
        offload=offload,
        quiet=quiet,
    )
    if reward is not None and not quiet:
        told = ", ".join(f"{name} {value:.6g}" for name, value in score_summary(folder).items())
        typer.echo(f"scores: {told}", err=True)
    typer.echo(folder)


@adapters.command("mix")
def mix(
    adapter: Annotated[list[str], typer.Argument(help="FOLDER=WEIGHT; without a weight 1. Several are added up.")],
    output: Annotated[Path, typer.Option(help="Folder for the result, which --adapter takes.")],
    scale: Annotated[float, typer.Option(help="Of the whole; 0 is the base model.")] = 1.0,
) -> None:
    """Add up the updates of several LoRAs, or SaRAs, each with its weight, into one: exactly."""
    from genkit.adapters import mix_adapters, parse_adapter

    typer.echo(mix_adapters([parse_adapter(text) for text in adapter], output, scale=scale))


@evaluation.command("run")
def evaluate(
    reference: Annotated[
        str,
        typer.Argument(
            help="Real images: a folder, .zip, .npz, hf:NAME, saved statistics or features, or 'digits'.",
        ),
    ],
    generated: Annotated[
        str, typer.Argument(help="Generated images, likewise; or pipeline:FOLDER, or reconstructed:AUTOENCODER.")
    ],
    metrics: Annotated[
        str | None, typer.Option(help="Names separated by commas; all that are possible by default.")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help=f"Feature extractor, with settings: inception:resize=clean. One of {EXTRACTORS}.")
    ] = "digits",
    n: Annotated[int | None, typer.Option("--n", "-n", help="Use only this many images of each side.")] = None,
    nfe: Annotated[float | None, typer.Option(help="Network calls spent on each image, for the record.")] = None,
    size: Annotated[int | None, typer.Option(help="Make all images this many pixels wide and high.")] = None,
    crop: Annotated[
        str | None, typer.Option(help="How: center (ADM's rule, the default) or squash (bicubic, whatever the aspect).")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Of pipeline:FOLDER, as 25 or linear:hi=50,lo=5; the pipeline's own by default."),
    ] = None,
    guider: Annotated[str | None, typer.Option(help="Of pipeline:FOLDER, as cfg:guidance_scale=2.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Of pipeline:FOLDER, as pndm.")] = None,
    arguments: Annotated[
        str | None, typer.Option("--set", help="Others of pipeline:FOLDER's call: height=512.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="A file with a prompt or label a line, in place of the reference's.")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="JSON with names of the labels, to make prompts of them for pipeline:FOLDER.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Such a prompt: 'a photo of a {}' by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of pipeline:FOLDER: float32, float16 or bfloat16.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at images that cannot be read, or had to be converted.")
    ] = False,
    intervals: Annotated[int | None, typer.Option(help="This many random halves, for 95 % intervals: 200.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the evaluation, with images, which genkit eval report reads.")
    ] = None,
    seed: int = 0,
    batch_size: int = 256,
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report here.")] = None,
    quiet: Silent = False,
) -> None:
    """Evaluate a set of generated images against real ones; those of a pipeline are made meanwhile."""
    from genkit.eval.by_name import split
    from genkit.eval.command import main
    from genkit.eval.sides import Generation

    main(
        reference,
        generated,
        metrics=None if metrics is None else split(metrics),
        extractor=extractor,
        n=n,
        nfe=nfe,
        size=size,
        crop=crop,  # type: ignore[arg-type]  # refused if it is another word
        generation=Generation(steps, guider, scheduler, arguments, inputs, class_names, template, dtype),
        seed=seed,
        batch_size=batch_size,
        device=device,
        strict=strict,
        intervals=intervals,
        output=output,
        json_path=json_path,
        html_path=html_path,
        command=_called,
        quiet=quiet,
    )


@evaluation.command("features")
def features(
    images: Annotated[str, typer.Argument(help="A folder, .zip, .npz, hf:NAME or 'digits'.")],
    output: Annotated[Path, typer.Argument(help="The file to write, *.safetensors.")],
    extractor: Annotated[str, typer.Option(help="Feature extractor, as for eval run.")] = "digits",
    size: Annotated[int | None, typer.Option(help="Make all images this many pixels wide and high.")] = None,
    crop: Annotated[str | None, typer.Option(help="How: center or squash, as for eval run.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at images that cannot be read, or had to be converted.")
    ] = False,
    batch_size: int = 256,
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
    quiet: Silent = False,
) -> None:
    """Measure a set once, so that eval run and sweep can take the file as a reference."""
    from genkit.eval.command import measure_features

    measure_features(
        images,
        output,
        extractor=extractor,
        size=size,
        crop=crop,  # type: ignore[arg-type]  # refused if it is another word
        strict=strict,
        batch_size=batch_size,
        device=device,
        quiet=quiet,
    )


@evaluation.command("mmhm")
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
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report here.")] = None,
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


@evaluation.command("geneval")
def score_geneval(
    detections: Annotated[Path, typer.Argument(help="JSON or .jsonl: a prompt's metadata and what was detected.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write scores and every verdict here.")] = None,
    quiet: Silent = False,
) -> None:
    """Score a detector's findings by GenEval's rules."""
    from genkit.eval.geneval import main

    main(detections, json_path=json_path, quiet=quiet)


@evaluation.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluations or sweeps, JSON files of results.")],
    html_path: Annotated[Path, typer.Option("--html", help="Write the page here.")],
    metrics: Annotated[str | None, typer.Option(help="Which to show, in this order: fid,kid. All by default.")] = None,
    mmhm: Annotated[
        str | None, typer.Option(help="What MMHM is made of, as in eval mmhm; the published four by default.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="What the page is called.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Show runs of different protocols together; the page says so.")
    ] = False,
    quiet: Silent = False,
) -> None:
    """Compare evaluations on one self-contained HTML page: winners, plots, correlations, images and the protocol."""
    from genkit.eval.page import main

    main(runs, html_path, metrics=metrics, mmhm=mmhm, title=title, force=force, quiet=quiet)


@evaluation.command("correlate")
def correlate(
    tables: Annotated[list[Path], typer.Argument(help="CSV or JSON tables, folders of evaluations or sweeps.")],
    metrics: Annotated[str | None, typer.Option(help="Which: fid,is,mmhm. All that are there by default.")] = None,
    mmhm: Annotated[
        str | None, typer.Option(help="What MMHM is made of, as in eval mmhm; the published four by default.")
    ] = None,
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


@evaluation.command("doctor")
def explain_difference(
    a: Annotated[str, typer.Argument(help="Real images: a folder, .zip, .npz; or a result of eval run.")],
    b: Annotated[str, typer.Argument(help="Generated images, likewise; or another result.")],
    extractor: Annotated[
        str | None, typer.Option(help="One with a setting resize: inception (by default), dinov2 or clip.")
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="Resize rules to try, separated by commas: tf1,clean. All by default.")
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Two published numbers X,Y: which of these choices, on A and B, makes X - Y?")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Use only this many images of each side.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of those.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write what was found here.")] = None,
    quiet: Silent = False,
) -> None:
    """Say why two Frechet distances differ: by resize rule, JPEG and number of images, or by two results' protocols."""
    from genkit.eval.explain import main

    main(
        a,
        b,
        extractor=extractor,
        rules=rules,
        values=values,
        n=n,
        seed=seed,
        batch_size=batch_size,
        device=device,
        json_path=json_path,
        quiet=quiet,
    )


@evaluation.command("sweep")
def sweep(
    model: Annotated[str, typer.Argument(help="Folder of a pipeline, genkit's or Diffusers', or owner/name.")],
    reference: Annotated[str, typer.Argument(help="Real images: a folder, .npz, saved statistics, or 'digits'.")],
    output: Annotated[Path, typer.Option(help="Folder for the sweep; one of the same settings goes on.")],
    steps: Annotated[str, typer.Option(help="Numbers of steps: 1,2,4,25.")],
    guidance: Annotated[str, typer.Option(help="Guidance scales: 1,1.5,3,7; 1 is no guidance.")] = "1",
    guider: Annotated[
        str | None, typer.Option(help="Guiders, with settings but no scale: cfg,apg:eta=0. By default cfg.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Schedulers, with settings: pndm,DDIMScheduler. By default the pipeline's own.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names separated by commas; all that are possible by default.")
    ] = None,
    extractor: Annotated[str, typer.Option(help="Feature extractor, as for eval run.")] = "digits",
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Images a cell, and of the reference; by default all of that.")
    ] = None,
    mmhm: Annotated[
        str | None, typer.Option(help="What MMHM is made of, as in eval mmhm; the published four by default.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA or SaRA, FOLDER or FOLDER=0.7, which add up; a learned word, FOLDER."),
    ] = None,
    arguments: Annotated[
        str, typer.Option("--set", help="Others of the pipeline's call: height=512,negative_prompt='blurry'.")
    ] = "",
    size: Annotated[int | None, typer.Option(help="Make all images, real and generated, this large.")] = None,
    crop: Annotated[str | None, typer.Option(help="How, with --size: center (default) or squash.")] = None,
    intervals: Annotated[int | None, typer.Option(help="This many random halves, for 95 % intervals: 200.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at what would be a note.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Rank cells of different protocols together; the result says so.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the table here too.")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Write the table here too.")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report here.")] = None,
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


@evaluation.command("watch")
def watch(
    run_dir: Annotated[Path, typer.Argument(help="The output_dir of a training, running or ended.")],
    reference: Annotated[str, typer.Argument(help="Real images: a folder, .npz, saved statistics, or 'digits'.")],
    steps: Annotated[
        str | None, typer.Option(help="Numbers of inference steps: 1,4. By default the recipe's own for samples.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names separated by commas; all that are possible by default.")
    ] = None,
    extractor: Annotated[str, typer.Option(help="Feature extractor.")] = "digits",
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Images on each side; all of the reference by default.")
    ] = None,
    best: Annotated[str | None, typer.Option(help="The value that the best checkpoint is chosen by.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate what is there, and stop.")] = False,
    poll: Annotated[float, typer.Option("--poll", "--every", help="Seconds between looks.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    device: Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")] = None,
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


@app.command()
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


@app.command()
def cite(target: Annotated[str, typer.Argument(help="A method (apg, flow_map ...) or the folder of a run.")]) -> None:
    """Print the BibTeX of a method, or of everything that a run used."""
    from genkit.cite import bibtex

    typer.echo(bibtex(target), nl=False)


def main() -> None:
    """Run the command; what a user can mend is one message, without a trace."""
    global _called
    _called = shlex.join(["genkit", *sys.argv[1:]])
    try:
        app(standalone_mode=True)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    finally:
        _called = None


if __name__ == "__main__":
    main()
