"""genkit's own two-time transformer as a flow map."""

import torch
from torch import Tensor

from genkit.denoisers.base import Condition, FlowMap
from genkit.networks.dit import DiT


class TwoTimeDiT(FlowMap):
    """:class:`genkit.networks.dit.DiT`, whose times are those of the interpolant itself.

    The output may be of any prediction type; off the diagonal it is read as a velocity with the coefficients of ``t``.
    """

    network_classes = ("DiT",)
    network: DiT

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.network(z, t, None, condition.values.get("class_labels"))

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        labels = condition.values.get("class_labels") if condition else None
        u = self.network(x, t, s, labels)
        return self.interpolant.convert(u, self.prediction_type, "flow_prediction", x, t)

    def encode(self, pipe, class_labels: Tensor | list[int] | None = None) -> Condition:
        """A condition from labels ``(B,)``; ``None`` for an unconditional network.

        Raises:
            ValueError: a label outside ``0 .. num_classes - 1``.
        """
        n = self.network.config.num_classes
        if class_labels is None and not n:
            return Condition()
        if class_labels is None:
            raise ValueError(f"class_labels=None, but the network is conditional: accepted are 0 to {n - 1}")
        class_labels = torch.as_tensor(class_labels, dtype=torch.int64, device=self.network.device)
        if not n:
            raise ValueError("class_labels were given but the network is unconditional (num_classes=0)")
        bad = class_labels[(class_labels < 0) | (class_labels >= n)]
        if len(bad):
            raise ValueError(f"class_labels={bad.tolist()[:5]}: accepted are 0 to {n - 1}")
        return Condition({"class_labels": class_labels}, {"class_labels": class_labels.new_full(class_labels.shape, n)})
