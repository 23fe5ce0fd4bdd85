"""Frozen weights in eight bits, so that a network takes a quarter of its memory: in plain PyTorch, on any device."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.registry import unknown

Quantization = Literal["none", "int8", "torchao", "bitsandbytes"]


_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of their weights


class Int8Weight(nn.Module, ABC):
    """A weight as int8 and a scale an output channel: ``w = scale * round(w / scale)``, ``scale = max |w| / 127``.

    ``weight`` is made anew at every use, in the dtype that it had, and is no parameter: it does not train. The state
    dict is that of the ordinary layer with the rounded weight, so that a network is saved as one that anyone can load.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Module):
        super().__init__()
        values, scale = _rounded(layer.weight.detach())  # type: ignore[arg-type, operator]
        # Parameters, not buffers, which DDP would send around at every step.
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)  # type: ignore[operator]
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "values"], destination[prefix + "scale"]
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            values, scale = _rounded(state_dict.pop(prefix + "weight"))
            state_dict |= {prefix + "values": values, prefix + "scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-127, 127] and their scales, in the dtype of the weight, in which they are multiplied again."""
    largest = weight.abs().float().flatten(1).amax(1)
    scale = (largest / 127).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(Int8Weight):
    """A linear layer of :class:`Int8Weight`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def restored(self) -> nn.Module:
        with torch.device("meta"):
            layer = nn.Linear(self.values.shape[1], self.values.shape[0])
        return self._put(layer)


class Int8Conv(Int8Weight):
    """A convolution of :class:`Int8Weight`, of one, two or three dimensions."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d):
        super().__init__(layer)
        if layer.padding_mode != "zeros":
            raise ValueError(f"padding_mode={layer.padding_mode!r} of a convolution; int8 takes zeros")
        self.kind: Any = type(layer)
        self.geometry: dict[str, Any] = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        return _CONVOLUTIONS[self.values.ndim](x, self.weight, self.bias, **self.geometry)

    def restored(self) -> nn.Module:
        out, inner, *kernel = self.values.shape
        with torch.device("meta"):
            layer = self.kind(inner * self.geometry["groups"], out, tuple(kernel), **self.geometry)
        return self._put(layer)


def quantize(module: nn.Module, how: Quantization = "int8") -> nn.Module:
    """Keep the weights of linear layers and convolutions in int8, in place; what computes is what it was.

    Args:
        module: frozen. Layers at any depth whose type is ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``
            are replaced, one that stands in several places by one; subclasses of these and all else stay.
        how: ``int8``, of this module. ``torchao`` is that package's weight-only int8, ``bitsandbytes`` that package's
            LLM.int8, which rounds what enters layers, too; both are of linear layers. ``none`` leaves all as it is.

    Raises:
        ValueError: an unknown way, a package that is not installed, a layer that trains, a bare layer.
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
        ValueError: a layer that another package has quantised, which cannot be restored here; a bare layer.
    """
    _replace(module, dict.fromkeys((Int8Linear, Int8Conv), lambda layer: layer.restored()))
    for name, weight in module.named_parameters():
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            kind = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
            raise ValueError(
                f"the layer {name.rpartition('.')[0]} is quantised by another package ({kind}) and cannot be restored "
                "here; load the network without quantization"
            )
    return module


def _replace(module: nn.Module, made_of: Mapping[type, Callable[[Any], nn.Module]]) -> nn.Module:
    """Layers of some types by others, in place."""
    if type(module) in made_of:
        raise ValueError(
            f"a bare {type(module).__name__} cannot be replaced in place; put it into a module, as nn.Sequential(layer)"
        )
    made: dict[nn.Module, nn.Module] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if type(child) in made_of:
            if child not in made:
                made[child] = made_of[type(child)](child)
            parent, _, key = name.rpartition(".")
            setattr(module.get_submodule(parent), key, made[child])
    return module


def _int8(module: nn.Module) -> nn.Module:
    kinds: dict[type, Callable[[Any], nn.Module]] = {nn.Linear: Int8Linear}
    return _replace(module, kinds | dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Int8Conv))


def _torchao(module: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def _bitsandbytes(module: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    def made(layer: nn.Linear) -> nn.Module:
        bias = layer.bias is not None
        new = Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
        new.load_state_dict(layer.state_dict())
        return new.requires_grad_(False)

    return _replace(module, {nn.Linear: made})
