"""What a guider is given for the samples, a row a sample: which row is whose, and whether it fits them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genkit.denoisers.flux import pack


@dataclass
class Rows:
    """Which row of what a guider was given each sample is, and the state of the rule inside it."""

    index: Tensor
    inner_state: Any = None

    def gather(self, index) -> "Rows":
        return Rows(self.index[index], None if self.inner_state is None else self.inner_state.gather(index))


def rows_of(value: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` ``(B,)`` of ``value`` ``(1 or more, ...)``; a single one belongs to every sample."""
    return value.expand(len(index), *value.shape[1:]) if len(value) == 1 else value[index.to(value.device)]


def rows_like(value: Tensor, index: Tensor, z: Tensor) -> Tensor:
    """:func:`rows_of`, of dtype and device of the samples ``z``, and in tokens where a pipeline packs its latents."""
    value = value.to(z)
    return rows_of(pack(value) if value.ndim == 4 and z.ndim == 3 else value, index)


def check_rows(setting: str, value, shape: tuple[int, ...]) -> None:
    """Refuse what is not a tensor like the samples of ``shape``, one for all or one a sample.

    Of samples that a pipeline packs in tokens ``(B, N, 4 C)``, the unpacked ones ``(1 or B, C, H, W)`` are accepted.

    Args:
        setting: what it is, for errors.

    Raises:
        ValueError: no tensor, not of floating point, of another shape, or not finite.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{setting}={got}: accepted is a tensor (1 or B, ...) like the samples, of floating point")
    given, shape = tuple(value.shape), tuple(shape)
    if len(shape) == 3 and len(given) == 4:
        fits = (4 * given[1], given[2] // 2 * (given[3] // 2)) == (shape[2], shape[1])
        fits = fits and given[2] % 2 == given[3] % 2 == 0
        wanted = f"(1 or {shape[0]}, {shape[2] // 4}, H, W) of an even size and {shape[1]} patches"
    else:
        fits, wanted = given[1:] == shape[1:], f"(1 or {shape[0]}, {', '.join(map(str, shape[1:]))})"
    if not fits or given[0] not in (1, shape[0]):
        raise ValueError(f"{setting} has shape {given}, the samples {shape}: accepted is {wanted}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{setting} has values that are not finite")
