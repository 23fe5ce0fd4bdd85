"""Commands of ``genkit eval`` on two sets of images: their distances, and what those are made of."""

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.options import Device, Extractor, HtmlReport, Intervals, MetricNames, Silent
from genkit.registry import file_names

EXTRACTORS = ", ".join(file_names("genkit.eval.extractors"))

Number = Annotated[int | None, typer.Option("--n", "-n", help="Use only this many images of each side.")]
Size = Annotated[int | None, typer.Option(help="Make all images this many pixels wide and high.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at images that cannot be read, or had to be converted.")]


def evaluate(
    context: typer.Context,
    reference: Annotated[
        str,
        typer.Argument(
            help="Real images: a folder, .zip, .npz, hf:NAME, saved statistics or features, or 'digits'.",
        ),
    ],
    generated: Annotated[
        str, typer.Argument(help="Generated images, likewise; or pipeline:FOLDER, or reconstructed:AUTOENCODER.")
    ],
    metrics: MetricNames = None,
    extractor: Annotated[
        str, typer.Option(help=f"Feature extractor, with settings: inception:resize=clean. One of {EXTRACTORS}.")
    ] = "digits",
    n: Number = None,
    nfe: Annotated[float | None, typer.Option(help="Network calls spent on each image, for the record.")] = None,
    size: Size = None,
    crop: Annotated[
        str | None, typer.Option(help="How: center (ADM's rule, the default) or squash (bicubic, whatever the aspect).")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Of pipeline:FOLDER, as 25, linear:hi=50,lo=5 or linear:budget=400; the pipeline's own by default."
        ),
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
    strict: Strict = False,
    intervals: Intervals = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the evaluation, with images, which genkit eval report reads.")
    ] = None,
    seed: int = 0,
    batch_size: int = 256,
    device: Device = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    html_path: HtmlReport = None,
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
        command=context.obj,
        quiet=quiet,
    )


def features(
    images: Annotated[str, typer.Argument(help="A folder, .zip, .npz, hf:NAME or 'digits'.")],
    output: Annotated[Path, typer.Argument(help="The file to write, *.safetensors.")],
    extractor: Extractor = "digits",
    size: Size = None,
    crop: Annotated[str | None, typer.Option(help="How: center or squash, as for eval run.")] = None,
    strict: Strict = False,
    batch_size: int = 256,
    device: Device = None,
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
    n: Number = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of those.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time.")] = None,
    device: Device = None,
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
