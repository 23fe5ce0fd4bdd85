"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Folder of a pipeline, genkit's or Diffusers', or owner/name.")]
Device = Annotated[str | None, typer.Option(help="Where to compute; the best there is by default.")]
CallArguments = Annotated[
    str, typer.Option("--set", help="Others of the pipeline's call: height=512,negative_prompt='blurry'.")
]
ItemSeed = Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")]
DType = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA or SaRA, FOLDER or FOLDER=0.7, which add up; a learned word, FOLDER."),
]
MetricNames = Annotated[str | None, typer.Option(help="Names separated by commas; all that are possible by default.")]
Mmhm = Annotated[str | None, typer.Option(help="What MMHM is made of, as in eval mmhm; the published four by default.")]
Intervals = Annotated[int | None, typer.Option(help="This many random halves, for 95 % intervals: 200.")]
Extractor = Annotated[str, typer.Option(help="Feature extractor, as for eval run.")]
HtmlReport = Annotated[Path | None, typer.Option("--html", help="Write a report here.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Silent = Annotated[bool, typer.Option("--quiet", help="Print nothing, neither progress nor what was found.")]
