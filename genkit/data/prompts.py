"""Prompts or class labels without samples, for methods that need no data."""

from pathlib import Path

from pydantic import Field, model_validator

from genkit.data.base import Source, SourceConfig


class PromptsConfig(SourceConfig):
    """What is asked for: ``prompts``, a ``file`` of them, or labels of ``num_classes`` classes."""

    prompts: list[str] | None = Field(default=None, min_length=1, description="the prompts themselves")
    file: Path | None = Field(default=None, description="text file, a prompt a line; empty lines are left out")
    num_classes: int | None = Field(default=None, ge=1, description="class labels 0 to num_classes - 1 instead")
    sample_shape: tuple[int, ...] | None = Field(
        default=None, description="shape of what the model makes, in its own space; by default what its config names"
    )

    @model_validator(mode="after")
    def _one(self):
        if sum(v is not None for v in (self.prompts, self.file, self.num_classes)) != 1:
            raise ValueError("exactly one of prompts, file and num_classes must be set")
        return self


class Prompts(Source):
    """Every prompt, or every class, once an epoch; no samples.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without prompts, or not in UTF-8.
    """

    Config = PromptsConfig
    shape = None

    def __init__(self, **settings):
        super().__init__(**settings)
        self.num_classes = self.config.num_classes
        self.prompts = self.config.prompts
        if self.config.file is not None:
            if not self.config.file.is_file():
                raise FileNotFoundError(f"data.file={str(self.config.file)!r} is not a file")
            try:
                lines = self.config.file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"data.file={str(self.config.file)!r} is not UTF-8: {error}") from None
            self.prompts = [line.strip() for line in lines if line.strip()]
            if not self.prompts:
                raise ValueError(f"data.file={str(self.config.file)!r} holds no prompts")
        self.length = self.num_classes or len(self.prompts)

    def read(self, records, items):
        if self.prompts is None:
            return {"class_labels": records}
        return {"prompts": [self.prompts[i] for i in records.tolist()]}
