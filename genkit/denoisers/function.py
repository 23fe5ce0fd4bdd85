"""Plain callables as denoisers: closed-form oracles, user networks, anything that is a function of ``(x, t)``."""

from collections.abc import Callable, Mapping

from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, FlowMap
from genkit.interpolants import Interpolant


class FunctionDenoiser(Denoiser):
    """``fn(x, t, **condition) -> raw prediction``, with ``t`` of shape ``(B,)`` and the condition's tensors by name.

    Args:
        fn: the callable; an ``nn.Module`` will do.
        interpolant: the path of its inputs.
        prediction_type: what it returns.
    """

    def __init__(self, fn: Callable[..., Tensor], interpolant: Interpolant, prediction_type: str):
        super().__init__(fn, interpolant, prediction_type)

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.network(z, t, **condition.values)


class FunctionFlowMap(FlowMap):
    """``fn(x, t, s, **condition) -> u``: a callable that returns the average velocity from ``t`` to ``s``."""

    def add_scalars(self, scalars: Mapping[str, float]) -> None:
        """Nothing: the function takes scalars by name, as it takes the rest of a condition."""

    def __init__(self, fn: Callable[..., Tensor], interpolant: Interpolant):
        super().__init__(fn, interpolant, "flow_prediction")

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        return self.network(x, t, s, **(condition.values if condition else {}))
