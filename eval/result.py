"""What an evaluation returns: values, and the protocol without which they mean nothing."""

import json
import os
from collections.abc import Mapping, Sequence
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
    matched: Literal["labels", "prompts", "images"] | None = Field(
        default=None,
        description="what both sides have the same of, each as often, where that is known; images: reconstructions "
        "against their originals",
    )
    seed: int
    device: str
    versions: dict[str, str]


class Result(BaseModel):
    """Values by name, network calls per image (``nfe``) if known, how they were made, and what to beware of.

    ``head_calls`` are those of a diffusion head per image, one after the other, of networks that have one beside.

    ``made_with`` is what the images were generated with (``model``, ``steps``, ``guidance_scale`` ...), where known;
    ``intervals`` has ``[low, high]`` of 95 %, where asked for, ``per_class`` values by label; ``command`` is
    the command line that was called, if one was.
    """

    # JSON has no number for the infinite PSNR of equal images; pydantic's default, null, could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    values: dict[str, float]
    nfe: float | None = Field(default=None, ge=0)
    head_calls: float | None = Field(default=None, ge=0)
    protocol: Protocol
    notes: list[str] = Field(default_factory=list)
    made_with: dict[str, Any] = Field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = Field(default_factory=dict)
    command: str | None = None

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
    for name, values in differences([result.protocol.model_dump(mode="json") for result in results]).items():
        if name.startswith("metrics."):
            chosen = " and ".join(map(str, values))
            raise ValueError(f"results with different settings of {name.removeprefix('metrics.')!r}: {chosen}")
        raise ValueError(f"results with different {name} cannot be compared: {sorted(map(str, values))}")


def differences(protocols: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Values by setting, of the settings in which rows differ; nothing where they can be compared.

    Of the protocol of ``genkit eval run`` count those in ``COMPARED``, and of its metrics' settings those of metrics
    that rows share. Others must agree whole, and a row without a protocol agrees with none.
    """
    flat = [_compared(protocol) for protocol in protocols]
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key) for one in flat if key in one or not key.startswith("metrics.")]
        distinct = {json.dumps(value, sort_keys=True, default=str): value for value in values}
        if len(distinct) > 1:
            found[key] = list(distinct.values())
    return found


def _compared(protocol: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(protocol)
    if set(kept) <= set(Protocol.model_fields) and {"extractor", "metrics", "versions"} <= set(kept):
        kept = {name: kept.get(name) for name in (*COMPARED, "metrics")}
    if isinstance(kept.get("metrics"), dict):
        kept |= {f"metrics.{name}": chosen for name, chosen in kept.pop("metrics").items()}
    return kept
