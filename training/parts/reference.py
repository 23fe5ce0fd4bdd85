"""The network that a student is held against: itself, an average of it, or what it was at the start."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Denoiser
from genkit.sara import sara_layers
from genkit.training.adapters import adapter_names, adapter_weights, add_adapter, base_network, using, without_adapter
from genkit.training.objectives.base import Role
from genkit.training.parts.apex_targets import next_decay
from genkit.training.sections import Adapter

NAME = "reference"


class Reference(nn.Module):
    """A student's reference, without a second copy of its weights where it is a LoRA.

    ===============  ==============================  ============================================
    ``decay``        a student that trains whole     a LoRA (of a SaRA, see below)
    ===============  ==============================  ============================================
    0                the student                     the student
    between          a copy that follows it          a second adapter that follows the first
    1                a copy                          the network with its adapter left out
    ===============  ==============================  ============================================

    A SaRA is left out at 1 as a LoRA is, and between has a copy of the network.

    The average follows by ``a <- kappa a + (1 - kappa) w`` after each update, with ``kappa`` on its way from 0 to
    ``decay`` (:func:`genkit.training.parts.apex_targets.next_decay`). Of a two-time LoRA only the adapter has a
    reference: ask it on the diagonal, where the embedder of the gap vanishes.
    """

    kappa: Tensor

    def __init__(self, student: Denoiser, decay: float):
        super().__init__()
        self.student, self.decay = student, decay
        self.lora = "default" in adapter_names(student)
        self.left_out = decay == 1 and bool(self.lora or sara_layers(base_network(student)))
        self.copy: Denoiser | None = None
        self.held: nn.Module | None = None  # weights of its own
        self._pairs: list[tuple[Tensor, Tensor]] = []  # of each, its own and the student's
        if decay == 0 or self.left_out:
            return
        if self.lora:
            self.held = self._second_adapter()
        else:
            self.copy = copy.deepcopy(student)
            self.held = self.copy.module.requires_grad_(False).eval()
            self._pairs = list(zip(self.held.parameters(), student.module.parameters(), strict=True))
        if decay < 1:
            self.register_buffer("kappa", torch.zeros((), dtype=torch.float64))

    def _second_adapter(self) -> nn.Module:
        network: Any = base_network(self.student)
        config = network.peft_config["default"]
        settings = Adapter(rank=config.r, alpha=config.lora_alpha, target_modules=sorted(config.target_modules))
        add_adapter(self.student, NAME, settings)
        theirs = adapter_weights(self.student, "default")
        ours = adapter_weights(self.student, NAME)
        self._pairs = [(ours[k.replace(".default.", f".{NAME}.")], w) for k, w in theirs.items()]
        with torch.no_grad():
            for own, weight in self._pairs:
                own.requires_grad_(False).copy_(weight)
        return nn.ParameterDict({k.replace(".", "/"): v for k, v in ours.items()})

    @property
    def roles(self) -> dict[str, Role]:
        """Its part in a method, where it has weights of its own."""
        return {} if self.held is None else {NAME: Role(self.held, trains=False, kept=self.decay < 1)}

    @contextmanager
    def network(self) -> Iterator[Denoiser]:
        """The reference to call within; no gradients."""
        with torch.no_grad():
            if self.left_out:
                with without_adapter(self.student):
                    yield self.student
            elif self.copy is not None or self.decay == 0:
                yield self.copy or self.student
            else:
                with using(self.student, NAME):
                    yield self.student

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by one update."""
        if not 0 < self.decay < 1:
            return
        for own, weight in self._pairs:
            own.lerp_(weight.detach(), 1 - float(self.kappa))
        self.kappa.copy_(next_decay(self.kappa, self.decay))
