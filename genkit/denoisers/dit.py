"""DiTTransformer2DModel, class-conditional."""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from genkit.denoisers.base import Condition
from genkit.denoisers.network import NetworkDenoiser
from genkit.interpolants import Interpolant


class DiT(NetworkDenoiser):
    """``transformer(z, timestep, class_labels)``, its learned variances dropped.

    Condition: ``class_labels`` ``(B,)`` int64; the unconditional branch is the label ``num_classes``.
    """

    network_classes = ("DiTTransformer2DModel",)
    condition_names = ("class_labels",)

    def __init__(self, network: nn.Module, interpolant: Interpolant, prediction_type: str):
        super().__init__(network, interpolant, prediction_type)
        # In training mode every block would drop labels by itself, from the global random state. Dropping a condition
        # is the objective's business: an item at once, by its own seed.
        for module in self.inner.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(self, z: Tensor, t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        z, condition = self._inputs(z, condition)
        output = self.network(z, timestep=timestep, class_labels=condition["class_labels"], return_dict=False)[0]
        return output[:, : z.shape[1]]

    def time_modules(self) -> list[str]:
        return [f"transformer_blocks.{i}.norm1.emb" for i in range(len(self.inner.transformer_blocks))]

    def encode(self, pipe, class_labels: int | Sequence[int] | Tensor | None) -> Condition:
        """Class labels ``(B,)`` and the null class.

        Raises:
            ValueError: no labels, or a label out of range.
        """
        num_classes = self.inner.config.num_embeds_ada_norm
        if class_labels is None:
            raise ValueError(
                f"class_labels=None, but the network is class-conditional; accepted are 0 to {num_classes - 1}"
            )
        labels = torch.as_tensor(class_labels, device=self.inner.device).reshape(-1).long()
        bad = labels[(labels < 0) | (labels >= num_classes)]
        if len(bad):
            raise ValueError(f"class_labels={bad.tolist()} out of range; accepted are 0 to {num_classes - 1}")
        return Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, num_classes)})
