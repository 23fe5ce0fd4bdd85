"""What an evaluation returns: values, and the protocol without which they mean nothing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# What results must have in common to be compared, beside the settings of the metrics that they share.
COMPARED = ("extractor", "reference", "reference_images", "n_real", "n_gen", "matched")


class Protocol(BaseModel):
    """Everything besides the images that decides the values of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str
    reference: str | None
    generated: str
    n_real: int | None
    n_gen: int | None
    metrics: dict[str, dict[str, Any]]
    reference_images: str | None = Field(default=None, description="how they are stored, and what was done to them")
    generated_images: str | None = None
    matched: Literal["labels", "prompts"] | None = Field(
        default=None, description="what both sides have the same of, each as often, where that is known"
    )
    seed: int
    device: str
    versions: dict[str, str]


class Result(BaseModel):
    """Values by name, network calls per image (``nfe``) if known, how they were made, and what to beware of.

    ``made_with`` is what the images were generated with (``model``, ``steps``, ``guidance_scale`` ...), where known;
    ``intervals`` has ``[low, high]`` of values that were bootstrapped, ``per_class`` values by label.
    """

    # JSON has no number for the infinite PSNR of equal images; pydantic's default, null, could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    values: dict[str, float]
    nfe: float | None = Field(default=None, ge=0)
    protocol: Protocol
    notes: list[str] = Field(default_factory=list)
    made_with: dict[str, Any] = Field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = Field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write JSON, in one move; ``Result.load`` reads it."""
        partial = Path(path).with_name(Path(path).name + ".partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))


def require_comparable(results: Sequence[Result]) -> None:
    """Raise ``ValueError`` unless all results have the same extractor, reference, n on both sides and settings.

    A distance of 5,000 images is larger than that of 50,000 from the same model, so tables call this first.
    """
    for field in COMPARED:
        values = {getattr(result.protocol, field) for result in results}
        if len(values) > 1:
            raise ValueError(f"results with different {field} cannot be compared: {sorted(map(str, values))}")
    settings: dict[str, dict] = {}
    for result in results:
        for name, chosen in result.protocol.metrics.items():
            if settings.setdefault(name, chosen) != chosen:
                raise ValueError(f"results with different settings of {name!r}: {settings[name]} and {chosen}")
