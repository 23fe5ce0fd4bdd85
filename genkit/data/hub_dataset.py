"""Pictures from a data set of the ``datasets`` library: by name from the Hub, or from a local folder."""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from genkit.data._images import ImageConfig, prepare
from genkit.data.base import Source
from genkit.registry import unknown


class HubDatasetConfig(ImageConfig):
    """Which data set, and what its columns are called."""

    path: str = Field(description="a name on the Hub (downloaded), or a folder written by Dataset.save_to_disk")
    name: str | None = Field(default=None, description="the configuration (subset) of a data set on the Hub")
    split: str = Field(default="train", description="split; of the Hub's, slices such as train[:1%] too")
    revision: str | None = Field(default=None, description="commit, tag or branch on the Hub")
    image_column: str = Field(default="image", description="column of the pictures")
    label_column: str | None = Field(default=None, description="column of the classes")
    caption_column: str | None = Field(default=None, description="column of the captions")
    num_classes: int | None = Field(
        default=None, ge=1, description="needed if the label column does not name its classes"
    )


class HubDataset(Source):
    """Pictures of a data set of the ``datasets`` library: ``x0`` ``(B, C, size, size)`` in [-1, 1].

    ``class_labels`` and ``prompts`` come from the columns named in the settings. Nothing is downloaded unless ``path``
    is a name on the Hub.

    Raises:
        ImportError: the ``datasets`` library is not installed.
        ValueError: an unknown split or column; labels without a number of classes, or outside it.
    """

    Config = HubDatasetConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        try:
            import datasets
        except ImportError as error:
            raise ImportError("source 'hub_dataset' needs the datasets library: pip install datasets") from error
        config = self.config
        if any((Path(config.path) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            for setting in ("name", "revision"):
                if getattr(config, setting) is not None:
                    raise ValueError(
                        f"{setting}={getattr(config, setting)!r} is for the Hub, but path is a local folder"
                    )
            data = datasets.load_from_disk(config.path)
            if isinstance(data, datasets.DatasetDict):
                if config.split not in data:
                    raise ValueError(unknown("split", config.split, data))
                data = data[config.split]
        else:
            data = datasets.load_dataset(config.path, config.name, split=config.split, revision=config.revision)
        columns = [config.image_column]
        for setting in ("image_column", "label_column", "caption_column"):
            column = getattr(config, setting)
            if column is not None and column not in data.column_names:
                raise ValueError(unknown(setting, column, data.column_names))
        columns += [column for column in (config.label_column, config.caption_column) if column]
        if config.label_column is not None:
            named = getattr(data.features[config.label_column], "num_classes", None)
            self.num_classes = named or config.num_classes
            if self.num_classes is None:
                raise ValueError(f"label_column={config.label_column!r} names no classes; set num_classes")
        self.data = data.select_columns(columns).cast_column(config.image_column, datasets.Image())
        self.length = len(self.data)
        self.shape = config.shape

    def read(self, records, items):
        config = self.config
        flips = self.rng(items).integers(2) == 1 if config.horizontal_flip else [False] * len(items)
        rows = self.data[records.tolist()]
        images = rows[config.image_column]
        x0 = torch.stack([prepare(image, config, bool(flip)) for image, flip in zip(images, flips, strict=True)])
        batch: dict[str, Any] = {"x0": x0}
        if self.num_classes is not None:
            labels = torch.tensor(rows[config.label_column], dtype=torch.int64)
            if not bool(((labels >= 0) & (labels < self.num_classes)).all()):
                bounds = f"[{int(labels.min())}, {int(labels.max())}]"
                where = f"label_column={config.label_column!r} holds classes in {bounds}"
                raise ValueError(f"{where}; accepted are 0 to {self.num_classes - 1}")
            batch["class_labels"] = labels
        if config.caption_column is not None:
            batch["prompts"] = rows[config.caption_column]
            if not all(isinstance(text, str) for text in batch["prompts"]):
                raise ValueError(f"caption_column={config.caption_column!r} holds {batch['prompts']}; wanted texts")
        return batch
