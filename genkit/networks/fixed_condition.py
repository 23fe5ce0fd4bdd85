"""A condition that is the same for every sample, in the form of a component: a pipeline with it needs no encoders."""

from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from genkit.denoisers.base import Condition


class FixedCondition(ModelMixin, ConfigMixin):
    """One row of a condition, kept and saved with a pipeline.

    Args:
        shapes: of the row's tensors by name, without the batch.
        integers: names of those that hold whole numbers (class labels).
    """

    @register_to_config
    def __init__(self, shapes: Mapping[str, Sequence[int]], integers: Sequence[str] = ()):
        super().__init__()
        dtypes = {name: torch.int64 if name in integers else torch.float32 for name in shapes}
        self.row = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(1, *shape, dtype=dtypes[name]), requires_grad=False)
                for name, shape in shapes.items()
            }
        )

    @classmethod
    def of(cls, condition: Condition) -> "FixedCondition":
        """The first row of ``condition``."""
        values = condition.values
        made = cls(
            {name: tuple(v.shape[1:]) for name, v in values.items()},
            [name for name, v in values.items() if not v.is_floating_point()],
        )
        for name, value in values.items():
            made.row[name].data = value[:1].detach().to(made.row[name].dtype).cpu()
        return made

    def forward(self, n: int) -> Condition:
        """``n`` samples under it."""
        return Condition({name: value.expand(n, *value.shape[1:]) for name, value in self.row.items()})
