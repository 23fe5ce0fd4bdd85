"""How far a sweep is, and how long it will take."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from genkit.eval.cells import Cell
from genkit.eval.inputs import ImageSet
from genkit.eval.processes import own, rank_and_count


class Progress:
    """A bar over the images of all cells, with the time that is left, told by what the cells cost."""

    def __init__(self, wanted: Sequence[Cell], missing: Sequence[Cell], n: int, batch_size: int, quiet: bool):
        self.n, self.left = n, sum(cell.cost for cell in missing) * n
        self.share, self.done = max(len(own(n, batch_size)), 1), 0.0
        before = (len(wanted) - len(missing)) * n
        self.bar = tqdm(
            total=len(wanted) * n,
            initial=before,
            unit="image",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}{postfix}]",
            disable=quiet or rank_and_count()[0] > 0 or None,
        )
        self.before = before

    def of(self, cell: Cell, images: ImageSet) -> ImageSet:
        """The images, counted the first time that they are asked for."""
        self.bar.set_description_str(cell.name.rpartition("-")[0])
        self.bar.n, self.before = self.before, self.before + self.n
        asked = torch.zeros(self.n, dtype=torch.bool)

        def load(indices: Tensor) -> Tensor:
            new = int((~asked[indices]).sum()) * self.n / self.share
            asked[indices] = True
            loaded = images.load(indices)
            self.done += new * cell.cost
            rate = self.done / max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix_str(
                f"{tqdm.format_interval(max(self.left - self.done, 0) / rate)} left", refresh=False
            )
            self.bar.update(min(round(new), self.before - self.bar.n))
            return loaded

        return replace(images, load=load)

    def close(self) -> None:
        self.bar.n = self.before
        self.bar.close()
