"""Frozen weights in eight bits, so that a network takes a quarter of its memory: in plain PyTorch, on any device."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.registry import unknown

Quantization = Literal["none", "int8", "torchao", "bitsandbytes"]


class Int8Weight(nn.Module, ABC):
    """A weight as int8 and a scale an output channel: ``w = scale * round(w / scale)``, ``scale = max |w| / 127``.

    ``weight`` is made anew at every use, in the dtype that it had, and is no parameter: it does not train.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        weight = layer.weight.detach()
        largest = weight.abs().float().flatten(1).amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        scale = (largest / 127).view(-1, *[1] * (weight.ndim - 1))
        # Parameters, not buffers, which DDP would send around at every step.
        self.values = nn.Parameter((weight.float() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        return self.values.to(self.scale.dtype) * self.scale

    @abstractmethod
    def restored(self) -> nn.Module:
        """The ordinary layer, with the rounded weight."""

    def _put(self, layer: nn.Module) -> nn.Module:
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        bias = None if self.bias is None else nn.Parameter(self.bias.clone(), requires_grad=False)
        layer.register_parameter("bias", bias)
        return layer


class Int8Linear(Int8Weight):
    """A linear layer of :class:`Int8Weight`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def restored(self) -> nn.Module:
        with torch.device("meta"):
            layer = nn.Linear(self.values.shape[1], self.values.shape[0])
        return self._put(layer)


class Int8Conv2d(Int8Weight):
    """A convolution of :class:`Int8Weight`."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        if layer.padding_mode != "zeros":
            raise ValueError(f"padding_mode={layer.padding_mode!r} of a convolution; int8 takes zeros")
        self.geometry = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.geometry)

    def restored(self) -> nn.Module:
        out, inner, *kernel = self.values.shape
        with torch.device("meta"):
            layer = nn.Conv2d(inner * self.geometry["groups"], out, tuple(kernel), **self.geometry)  # type: ignore[arg-type]
        return self._put(layer)


def quantize(module: nn.Module, how: Quantization = "int8") -> nn.Module:
    """Keep the weights of linear layers and convolutions in int8, in place; what computes is what it was.

    Args:
        module: frozen; its linear layers are replaced at any depth.
        how: ``int8``, of this module. ``torchao`` is that package's weight-only int8, ``bitsandbytes`` that package's
            LLM.int8, which rounds what enters layers, too; both are of linear layers. ``none`` leaves all as it is.

    Raises:
        ValueError: an unknown way, a package that is not installed, a layer that trains.
    """
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "none": lambda m: m,
        "int8": _int8,
        "torchao": _torchao,
        "bitsandbytes": _bitsandbytes,
    }
    if how not in ways:
        raise ValueError(unknown("quantization", how, ways))
    if how != "none":
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                raise ValueError(
                    f"quantization={how!r}: the weight {name} trains; freeze it with requires_grad_(False)"
                )
    if how in ("torchao", "bitsandbytes") and importlib.util.find_spec(how) is None:
        raise ValueError(
            f"quantization={how!r}: pip install {how}, or take quantization='int8', which needs no package"
        )
    return ways[how](module)


def restore(module: nn.Module) -> nn.Module:
    """Ordinary layers again in place of those of :func:`quantize`, with their rounded weights, in place.

    Raises:
        ValueError: a layer that another package has quantised, which cannot be restored here.
    """
    for name, child in list(module.named_modules()):
        if isinstance(child, Int8Weight):
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, child.restored())
    for name, weight in module.named_parameters():
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            kind = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
            raise ValueError(
                f"the layer {name.rpartition('.')[0]} is quantised by another package ({kind}) and cannot be restored "
                "here; load the network without quantization"
            )
    return module


def _int8(module: nn.Module) -> nn.Module:
    kinds: dict[type, Callable[[nn.Module], nn.Module]] = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}  # type: ignore[dict-item]
    for name, child in list(module.named_modules()):
        if type(child) in kinds and name:
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, kinds[type(child)](child))
    return module


def _torchao(module: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def _bitsandbytes(module: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and name:
            bias = child.bias is not None
            layer = Linear8bitLt(child.in_features, child.out_features, bias, has_fp16_weights=False)
            layer.load_state_dict(child.state_dict())
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, layer.requires_grad_(False))
    return module
