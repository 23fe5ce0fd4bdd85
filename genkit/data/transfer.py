"""Two sources coupled at random: what a flow from the one distribution to the other is trained on."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from genkit.data.base import SeededConfig, Source
from genkit.registry import lookup


class Named(BaseModel):
    """A source by name, its settings beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="name of a source")

    def make(self, setting: str) -> Source:
        """The source.

        Raises:
            ValueError: an unknown name or setting.
        """
        return lookup("genkit.data", Source, self.name, setting=setting)(**(self.model_extra or {}))


class TransferConfig(SeededConfig):
    """The two ends."""

    x0: Named = Field(description="source of the end at t = 0, which is generated")
    eps: Named = Field(description="source of the end at t = 1, which is started from, in place of noise")


class Transfer(Source):
    """``x0`` of one source with its labels or prompts, and ``eps``, the sample of another that is drawn with it.

    Every visit of an item draws its partner anew, uniformly: the independent coupling.

    Raises:
        ValueError: sources without samples, or of different shapes.

    Source: Liu et al., "Flow straight and fast", arXiv 2209.03003, section 5.3 (transfer between domains).
    """

    Config = TransferConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        self.clean, self.start = self.config.x0.make("x0.name"), self.config.eps.make("eps.name")
        if self.clean.shape is None or self.clean.shape != self.start.shape:
            raise ValueError(
                f"x0={self.config.x0.name!r} has samples of shape {self.clean.shape}, eps={self.config.eps.name!r} of "
                f"{self.start.shape}; they must be equal"
            )
        self.shape, self.length, self.num_classes = self.clean.shape, self.clean.length, self.clean.num_classes

    def read(self, records, items):
        batch: dict[str, Any] = self.clean.__getitems__(items)
        partners = self.rng(items).integers(self.start.length or 1 << 62)
        return {**batch, "eps": self.start.__getitems__(partners)["x0"]}
