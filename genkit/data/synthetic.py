"""Random tensors of declared shapes, so that any recipe runs without data."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from genkit.data.base import SeededConfig, Source


class TensorField(BaseModel):
    """One tensor of a synthetic batch: standard normal, or whole numbers below ``high``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: tuple[int, ...] = Field(default=(), description="shape of one item")
    high: int | None = Field(default=None, ge=1, description="draw int64 in [0, high) instead of normal float32")


class SyntheticConfig(SeededConfig):
    """What a synthetic batch holds."""

    shape: tuple[int, ...] = Field(default=(3, 32, 32), description="shape of a clean sample")
    num_classes: int | None = Field(default=None, ge=1, description="draw class_labels below this number")
    prompts: bool = Field(default=False, description="give every item a prompt of its own")
    fields: dict[str, TensorField] = Field(default_factory=dict, description="further tensors by name")


class Synthetic(Source):
    """Endless items of noise: ``x0`` standard normal, cut to [-1, 1] like an image, and every field declared.

    Raises:
        ValueError: a field that bears the name of one the source makes itself.
    """

    Config = SyntheticConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        for name in ("x0", "class_labels", "prompts"):
            if name in self.config.fields:
                raise ValueError(f"fields={name!r}: that name is taken; set shape, num_classes or prompts instead")
        self.shape = self.config.shape
        self.num_classes = self.config.num_classes

    def read(self, records, items):
        rng = self.rng(items)
        batch: dict[str, Any] = {"x0": rng.normal(self.config.shape).clamp_(-1, 1)}
        if self.num_classes is not None:
            batch["class_labels"] = rng.integers(self.num_classes)
        if self.config.prompts:
            batch["prompts"] = [f"synthetic item {i}" for i in items.tolist()]
        for name, field in sorted(self.config.fields.items()):
            batch[name] = rng.normal(field.shape) if field.high is None else rng.integers(field.high, field.shape)
        return batch
