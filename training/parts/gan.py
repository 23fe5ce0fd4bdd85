"""What generator and discriminator of pictures pay: hinge or non-saturating losses, LeCam, and taming's weight."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from genkit.quantizers import processes

GANLoss = Literal["hinge", "non_saturating"]


def generator_loss(fake: Tensor, kind: GANLoss) -> Tensor:
    """``-E D(x^)`` (``hinge``) or ``E softplus(-D(x^))`` of logits on what was generated."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GANLoss) -> Tensor:
    """Half of ``E max(0, 1 - D(x)) + E max(0, 1 + D(x^))``, or of ``E softplus(-D(x)) + E softplus(D(x^))``."""
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """``|a| / (|b| + 1e-4)`` in [0, 10^4], of two gradients with respect to the last layer, means over processes.

    Source: Esser et al., "Taming transformers for high-resolution image synthesis", arXiv 2012.09841, eq. 7.
    """
    n = processes.count()
    a, b = (processes.add_up(g.detach()).norm() / n for g in (reconstruction, adversarial))
    return (a / (b + 1e-4)).clamp(0, 1e4)


class LastLayer:
    """A decoder's last convolution with what went in and came out of it.

    The gradient of its weight is made of that of its output: to ask autograd for it would go wrong under DDP's static
    graph and where activations are computed again.
    """

    def __init__(self, layer: nn.Conv2d, inputs: Tensor, out: Tensor):
        self.layer, self.inputs, self.out = layer, inputs, out

    def gradient(self, loss: Tensor) -> Tensor:
        """``d loss / d weight``, in float32 at least; the graph is kept."""
        (g,) = torch.autograd.grad(loss, self.out, retain_graph=True)
        wide = torch.promote_types(g.dtype, torch.float32)
        with torch.autocast(g.device.type, enabled=False), torch.no_grad():
            return conv2d_weight(self.inputs.to(wide), self.layer.weight.shape, g.to(wide), padding=self.layer.padding)


class LeCam(nn.Module):
    """``E max(0, D(x) - m_fake)^2 + E max(0, m_real - D(x^))^2`` with moving averages ``m`` of the logits.

    Averages are of all processes; they start as those of the first batch.

    Source: Tseng et al., "Regularizing generative adversarial networks under limited data", arXiv 2104.03310, eq. 3.
    """

    means: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty on logits; afterwards they enter the averages."""
        now = processes.add_up(torch.stack((real.detach().mean(), fake.detach().mean()))) / processes.count()
        m_real, m_fake = torch.where(self.started, self.means, now).unbind()
        penalty = F.relu(real - m_fake).square().mean() + F.relu(m_real - fake).square().mean()
        with torch.no_grad():
            self.means.copy_(torch.where(self.started, self.decay * self.means + (1 - self.decay) * now, now))
            self.started.fill_(True)
        return penalty
