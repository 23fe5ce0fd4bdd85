"""Commands that draw samples."""

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.options import Adapters, CallArguments, Device, DType, ItemSeed, Model, Quiet

Prompts = Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")]
Labels = Annotated[
    str | None, typer.Option(help="Class labels, by number or name, separated by commas; all by default.")
]
Inputs = Annotated[Path | None, typer.Option(help="File with a prompt or a label a line, beside those.")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep on the device only what is computing.")]


def sample(
    pipeline: Model,
    output: Annotated[Path, typer.Option(help="Folder for the PNG files, a grid and metadata.jsonl.")],
    prompt: Prompts = None,
    labels: Labels = None,
    inputs: Inputs = None,
    num_inference_steps: Annotated[
        str | None,
        typer.Option(
            "--steps",
            help="Steps of the scheduler, the pipeline's own number by default; of a diffusion head also falling ones: "
            "linear:hi=50,lo=5, or linear:budget=400 in all.",
        ),
    ] = None,
    num_images: Annotated[int, typer.Option("--per-label", "--per-prompt", help="Images a label or prompt.")] = 1,
    guider: Annotated[
        str | None, typer.Option(help="Guider by name, with settings: apg:guidance_scale=4,eta=0.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler by name, with settings: pndm, DDIMScheduler:clip_sample=False.")
    ] = None,
    adapter: Adapters = None,
    arguments: CallArguments = "",
    seed: ItemSeed = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; does not change them.")] = 64,
    device: Device = None,
    dtype: DType = "float32",
    offload: Offload = False,
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


def pairs(
    pipeline: Model,
    output: Annotated[Path, typer.Option(help="Folder for the shards and pairs.json.")],
    num: Annotated[int, typer.Option(help="How many pairs.")],
    prompt: Prompts = None,
    labels: Labels = None,
    inputs: Inputs = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the scheduler; the pipeline's own number by default.")
    ] = None,
    guider: Annotated[str | None, typer.Option(help="Guider by name, with settings: cfg:guidance_scale=5.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler by name, with settings: pndm, DPMSolverMultistepScheduler.")
    ] = None,
    arguments: CallArguments = "",
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
    device: Device = None,
    dtype: DType = "float32",
    offload: Offload = False,
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
