"""What training and pipelines need of a network that is no denoiser, beside what its objective does with it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from genkit.denoisers.base import Condition
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer


class Student(ABC):
    """A network that makes samples in its own way: token after token, or from a picture.

    The neighbour of :class:`genkit.denoisers.base.Denoiser`: it shares the trainer, not the sampling loop. A pipeline
    says which networks it is for (``network_class``) and by which student they are trained (``student_class``).

    Attributes:
        shape: of a sample in the network's space, ``(C, H, W)``.
        num_classes: labels 0 to ``num_classes - 1``, and ``num_classes`` for "no class"; ``None`` without labels.
        component: what the network is called in its pipeline.
        takes_steps: whether ``num_inference_steps`` means something to :meth:`draw`.
        calls: evaluations of the network so far.
        head_calls: those of its diffusion head, one after the other; ``None`` of a network without one.
    """

    shape: tuple[int, ...]
    num_classes: int | None = None
    takes_steps: bool = False
    component: ClassVar[str] = "transformer"
    head_calls: int | None = None

    def __init__(self, network: Any):
        self.network = network
        self.calls = 0

    @classmethod
    def of_pipeline(cls, pipe: Any) -> "Student":
        """The student of a pipeline's network."""
        return cls(pipe.components[cls.component])

    @property
    def module(self) -> Any:
        """What has weights."""
        return self.network

    def with_network(self, network: Any) -> "Student":
        """The same around another network."""
        return type(self)(network)

    def encode(self, pipe, *, class_labels: int | Sequence[int] | Tensor) -> Condition:
        """The condition of these labels; the unconditional branch is the label ``num_classes``.

        Raises:
            ValueError: a label out of range, or a network without labels.
        """
        if self.num_classes is None:
            raise ValueError(f"class_labels={class_labels}: {type(self.network).__name__} takes none")
        n = self.num_classes
        labels = torch.atleast_1d(torch.as_tensor(class_labels, dtype=torch.int64))
        if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < n:
            raise ValueError(f"class_labels={labels.tolist()}: accepted are 0 to {n - 1}, at least one")
        return Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, n)})

    def check(self, settings: Any) -> None:
        """Raise ``ValueError`` where this network cannot be sampled by these settings of its pipeline's
        ``sampling_class``, in themselves in order."""
        return

    def cost(self, settings: Any) -> float:
        """About how much a sample costs that is drawn by these settings, beside others of this network."""
        return 1.0 if settings.guidance_scale == 1 else 2.0

    @abstractmethod
    def draw(self, rng: ItemRNG, condition: Condition, num_inference_steps: int | StepAnnealer | None = None) -> Tensor:
        """Samples ``(B, *shape)``, float32, one a row of ``rng``, without guidance; a function of its row alone."""
