"""A folder of pictures, in class sub-folders or flat, with or without captions."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from genkit.data._images import ImageConfig, prepare
from genkit.data.base import Source

_METADATA = "metadata.jsonl"


class ImageFolderConfig(ImageConfig):
    """Settings of a folder of pictures."""

    path: Path = Field(description="the folder")
    caption_key: str = Field(default="text", description=f"key of the caption in {_METADATA}")


def _pictures(root: Path) -> list[Path]:
    """Files that Pillow can open by their suffix, in order; hidden ones are left out."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = (p for p in root.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))


class ImageFolder(Source):
    """Pictures below ``path``: ``x0`` ``(B, C, size, size)`` in [-1, 1].

    Pictures in sub-folders have ``class_labels``, the classes (``class_names``) being the sub-folders' names in order.
    ``prompts`` come from a text file beside each picture (``a.png``, ``a.txt``), or from ``metadata.jsonl``, whose
    lines ``{"file_name": ..., "text": ...}`` then are the pictures to use, wherever they lie; it knows no classes. A
    picture may have a ``score`` there, a number, and a ``group``, what it is compared within in place of its prompt.

    Raises:
        FileNotFoundError: no such folder, or a listed picture or caption that is not there.
        ValueError: no pictures, pictures both in sub-folders and beside them, a malformed ``metadata.jsonl``; at
            reading, a picture that cannot be decoded. Each names the file.
    """

    Config = ImageFolderConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        root = self.config.path
        if not root.is_dir():
            raise FileNotFoundError(f"path={str(root)!r} is not a folder")
        self.prompts: list[str] | None
        self._told: list[dict[str, Any]] = []  # of each picture, its score and group
        if (root / _METADATA).is_file():
            self.files, self.prompts = self._listed(root)
            folders = []
        else:
            self.files = _pictures(root)
            self.prompts = self._captions_beside()
            folders = [file.relative_to(root).parts[0] if file.parent != root else "" for file in self.files]
        if not self.files:
            raise ValueError(f"path={str(root)!r} holds no pictures")
        if any(folders) and not all(folders):
            stray = self.files[folders.index("")]
            raise ValueError(f"{stray} lies beside the class sub-folders of {root}; move it into one, or flatten them")
        self.class_names = sorted(set(filter(None, folders)))
        self.num_classes = len(self.class_names) or None
        self.labels = torch.tensor([self.class_names.index(name) for name in folders if name], dtype=torch.int64)
        self.length = len(self.files)
        self.shape = self.config.shape

    def _listed(self, root: Path) -> tuple[list[Path], list[str]]:
        files, prompts = [], []
        for number, line in enumerate((root / _METADATA).read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            place = f"{root / _METADATA}, line {number}"
            try:
                entry = json.loads(line)
                file, prompt = root / entry["file_name"], entry[self.config.caption_key]
                if not isinstance(prompt, str):
                    raise TypeError("a caption is text")
            except (ValueError, TypeError, KeyError) as error:
                wanted = f'{{"file_name": ..., "{self.config.caption_key}": ...}}'
                raise ValueError(f"{place}: wanted {wanted}, got {line.strip()[:80]!r}") from error
            if not file.is_file():
                raise FileNotFoundError(f"{place}: {file} is not there")
            files.append(file)
            prompts.append(prompt)
            self._told.append({key: entry[key] for key in ("score", "group") if key in entry})
        return files, prompts

    def scores(self) -> Tensor | None:
        """Those of ``metadata.jsonl``.

        Raises:
            ValueError: a picture without a score beside others that have one; a score that is no finite number.
        """
        found = [told.get("score") for told in self._told]
        if all(score is None for score in found):
            return None
        for file, score in zip(self.files, found, strict=True):
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise ValueError(f"{file}: its score in {_METADATA} is {score!r}; accepted is a finite number")
        return torch.tensor(found, dtype=torch.float32)

    def groups(self) -> Sequence[Any] | None:
        """Those of ``metadata.jsonl``, else the prompts, else the classes.

        Raises:
            ValueError: a picture without a group beside others that have one.
        """
        found = [told.get("group") for told in self._told]
        if all(group is None for group in found):
            return self.prompts if self.prompts is not None else self.labels.tolist() or None
        if None in found:
            raise ValueError(f"{self.files[found.index(None)]}: other pictures of {_METADATA} have a group")
        return found

    def _captions_beside(self) -> list[str] | None:
        texts = [file.with_suffix(".txt") for file in self.files]
        if not any(text.is_file() for text in texts):
            return None
        for text in texts:
            if not text.is_file():
                raise FileNotFoundError(f"caption {text} is not there, though other pictures have theirs")
        return [text.read_text(encoding="utf-8").strip() for text in texts]

    def read(self, records, items):
        flips = self.rng(items).integers(2) == 1 if self.config.horizontal_flip else [False] * len(items)
        chosen = records.tolist()
        x0 = torch.stack([self._load(i, bool(flip)) for i, flip in zip(chosen, flips, strict=True)])
        batch: dict[str, Any] = {"x0": x0}
        if self.num_classes:
            batch["class_labels"] = self.labels[records]
        if self.prompts is not None:
            batch["prompts"] = [self.prompts[i] for i in chosen]
        return batch

    def _load(self, record: int, flip: bool) -> torch.Tensor:
        try:
            with Image.open(self.files[record]) as image:
                return prepare(image, self.config, flip)
        except (OSError, SyntaxError) as error:  # Pillow reports broken PNGs as SyntaxError
            raise ValueError(f"picture {self.files[record]} cannot be read: {error}") from error
