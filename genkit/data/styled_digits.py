"""The digits in another style: something to adapt a model to."""

from typing import Literal

from pydantic import field_validator
from torch import Tensor

from genkit.data.base import SourceConfig
from genkit.data.digits import Digits

Style = Literal["plain", "inverted", "rotated"]


def restyle(x: Tensor, style: Style) -> Tensor:
    """``(..., H, W)`` in another style: dark on light for light on dark, or turned by a quarter to the left."""
    return {"plain": x, "inverted": -x, "rotated": x.rot90(1, (-2, -1))}[style]


def plain(x: Tensor, style: Style) -> Tensor:
    """The inverse of :func:`restyle`, bit for bit."""
    return {"plain": x, "inverted": -x, "rotated": x.rot90(-1, (-2, -1))}[style]


class StyledDigitsConfig(SourceConfig):
    """``classes``: only digits of these, all by default."""

    style: Style
    classes: list[int] | None = None

    @field_validator("classes")
    @classmethod
    def _digits(cls, classes):
        if classes is not None and (not classes or not set(classes) <= set(range(10))):
            raise ValueError("accepted are some of 0 to 9")
        return classes


class StyledDigits(Digits):
    """:class:`genkit.data.digits.Digits` after :func:`restyle`; labels are those of the digits."""

    Config = StyledDigitsConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        classes = self.config.classes
        if classes is not None:
            kept = (self.labels[:, None] == self.labels.new_tensor(classes)).any(1)
            self.images, self.labels = self.images[kept], self.labels[kept]
        self.images = restyle(self.images, self.config.style)
        self.length = len(self.images)
