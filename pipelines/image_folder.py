"""A folder of generated images to which a run that was stopped can go back."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_SETTINGS = "settings.json"
_SHEET = 4096  # pixels that a side of the sheet does not exceed by much


class ImageFolder:
    """PNG files of known names, ``settings.json``, and once all are there ``metadata.jsonl`` and ``grid.png``.

    A file is whole or not there, whenever the process is killed. Each image also carries its row and the settings, as
    text in the PNG.

    Args:
        folder: new, empty, or of an earlier run with the same settings.
        settings: of the run, JSON: what the images are a function of.
        rows: what ``metadata.jsonl`` says of each image, with its ``file_name``.

    Raises:
        ValueError: the folder holds something else, or images of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rows: list[dict[str, Any]]):
        self.folder, self.rows = folder, rows
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.paths = [folder / row["file_name"] for row in rows]
        record = folder / _SETTINGS
        if record.is_file():
            there = json.loads(record.read_text(encoding="utf-8"))
            differs = [key for key in self.settings.keys() | there.keys() if there.get(key) != self.settings.get(key)]
            if differs and any(folder.rglob("*.png")):
                was = {key: there.get(key) for key in sorted(differs)}
                raise ValueError(f"output={str(folder)!r} holds images made with {was}; choose another folder")
        elif folder.is_dir() and any(path.name != _part(record).name for path in folder.iterdir()):
            raise ValueError(f"output={str(folder)!r} is not empty and holds no {_SETTINGS} of earlier samples")
        folder.mkdir(parents=True, exist_ok=True)
        _write(record, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")

    @property
    def missing(self) -> list[int]:
        """Numbers of the images that are not there yet."""
        return [i for i, path in enumerate(self.paths) if not path.is_file()]

    def save(self, i: int, image: Image.Image) -> None:
        """Image number ``i``."""
        text = PngInfo()
        text.add_itxt("genkit", json.dumps({**self.rows[i], "settings": self.settings}, ensure_ascii=False))
        self.paths[i].parent.mkdir(parents=True, exist_ok=True)
        image.save(_part(self.paths[i]), format="PNG", pnginfo=text)
        _part(self.paths[i]).replace(self.paths[i])

    def finish(self, columns: int) -> None:
        """``metadata.jsonl`` and, of the first 400 images, ``grid.png``."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        _write(self.folder / "metadata.jsonl", "".join(lines))
        grid = self.folder / "grid.png"
        _grid(self.paths[:400], columns).save(_part(grid), format="PNG")
        _part(grid).replace(grid)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _write(path: Path, text: str) -> None:
    _part(path).write_text(text, encoding="utf-8")
    _part(path).replace(path)


def _grid(paths: list[Path], columns: int) -> Image.Image:
    columns = min(columns, len(paths))
    rows = -(-len(paths) // columns)
    with Image.open(paths[0]) as first:
        mode, (w, h) = first.mode, first.size
    enlarged, room = max(1, 48 // w), _SHEET / (max(columns * w, rows * h))
    scale = enlarged if enlarged * w * columns <= _SHEET else min(1.0, room)
    w, h = max(1, round(w * scale)), max(1, round(h * scale))
    filtering = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    sheet = Image.new(mode, (columns * (w + 2) - 2, rows * (h + 2) - 2), "white")
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            sheet.paste(image.resize((w, h), filtering), ((i % columns) * (w + 2), (i // columns) * (h + 2)))
    return sheet
