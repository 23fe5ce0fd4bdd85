"""What sets of images have in common that are made when they are asked for."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genkit.eval.inputs import UnreadableImage

# uint8 images of some items, and by its place among them what is wrong with one.
Make = Callable[[Sequence[int]], tuple[Tensor, dict[int, str]]]


class Spool:
    """Images that are made once each, and kept in a temporary file for as long as this object lasts.

    Args:
        make: called with at most ``batch_size`` items at a time.
        shape: ``(C, H, W)`` of an image.
        folder: where the temporary folder goes, if not where Python puts them.

    Raises:
        ValueError: no room there.
    """

    def __init__(
        self, make: Make, n: int, shape: tuple[int, int, int], batch_size: int, folder: str | Path | None = None
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.make, self.batch_size = make, batch_size
        self._folder = tempfile.TemporaryDirectory(prefix="genkit-images-", dir=folder, ignore_cleanup_errors=True)
        needed, free = n * math.prod(shape), shutil.disk_usage(self._folder.name).free
        if needed > free:  # a mapped file without room behind it would end the process
            raise ValueError(
                f"folder={str(folder or tempfile.gettempdir())!r}: {n} images take {needed:,} bytes, {free:,} are free"
            )
        path = Path(self._folder.name) / "images.bin"
        self._images = np.memmap(path, dtype=np.uint8, mode="w+", shape=(n, *shape))
        self._made = torch.zeros(n, dtype=torch.bool)
        self._bad: dict[int, str] = {}

    def load(self, indices: Tensor) -> Tensor:
        """uint8 ``(B, C, H, W)``. Raises ``UnreadableImage`` for one that went wrong."""
        missing = indices[~self._made[indices]].unique()
        for batch in missing.split(self.batch_size) if len(missing) else ():
            items = batch.tolist()
            images, bad = self.make(items)
            self._images[items] = images.numpy()
            self._bad.update({items[row]: message for row, message in bad.items()})
            self._made[batch] = True
        for item in indices.tolist():
            if item in self._bad:
                raise UnreadableImage(item, self._bad[item])
        return torch.from_numpy(self._images[indices.numpy()])


@contextlib.contextmanager
def evaluating(parts: Iterable[object]) -> Iterator[None]:
    """Within, modules among ``parts`` are in evaluation mode and there are no gradients; after it all is as before."""
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
