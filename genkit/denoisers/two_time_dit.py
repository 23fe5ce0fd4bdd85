"""genkit's own two-time transformer as a flow map."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Condition, FlowMap
from genkit.denoisers.network import NetworkDenoiser
from genkit.denoisers.scalars import told, without


class TwoTimeDiT(NetworkDenoiser, FlowMap):
    """:class:`genkit.networks.dit.DiT`, whose times are those of the interpolant itself.

    The output may be of any prediction type; off the diagonal it is read as a velocity with the coefficients of ``t``.
    """

    network_classes = ("DiT",)

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self._call(z, t, None, condition)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        u = self._call(x, t, s, condition or Condition())
        return self.interpolant.convert(u, self.prediction_type, "flow_prediction", x, t)

    def _call(self, x, t, s, condition):
        scalars = told(condition, self.scalars, t)
        z, condition = self._inputs(x, without(condition, self.scalars))
        return self.network(z, t, s, condition.values.get("class_labels"), scalars)

    @property
    def scalars(self) -> Mapping[str, float]:
        return self.inner.config.scalars or {}

    def add_scalars(self, scalars: Mapping[str, float]) -> None:
        self.inner.add_scalars(scalars)

    def embedders(self) -> list[nn.Module]:
        return [self.inner.gap_embed, self.inner.scalar_embed]

    def encode(self, pipe, class_labels: Tensor | list[int] | None = None) -> Condition:
        """A condition from labels ``(B,)``; ``None`` for an unconditional network.

        Raises:
            ValueError: a label outside ``0 .. num_classes - 1``.
        """
        n = self.inner.config.num_classes
        if class_labels is None and not n:
            return Condition()
        if not n:
            raise ValueError("class_labels were given but the network is unconditional (num_classes=0)")
        if class_labels is None:
            raise ValueError(f"class_labels=None, but the network is conditional: accepted are 0 to {n - 1}")
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=self.inner.device)
        bad = labels[(labels < 0) | (labels >= n)]
        if len(bad):
            raise ValueError(f"class_labels={bad.tolist()[:5]}: accepted are 0 to {n - 1}")
        return Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, n)})
