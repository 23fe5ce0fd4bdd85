"""Settings that rewards with a network share, and reading of published weights."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genkit.rewards.base import RewardConfig


class NetworkConfig(RewardConfig):
    """``model``: a Hub id or a folder. ``revision``: on the Hub. ``dtype``: of the weights; images are resized, and
    the reward is computed from the features, in float32. ``quantise``: see images as eight bits hold them, as they will
    be saved (the gradient passes by unchanged). ``antialias``: off only to compare with code that resizes without.
    """

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantise: bool = False
    antialias: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` itself."""
        return getattr(torch, self.dtype)


def read_weights(source: str, filename: str, revision: str | None = None) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of one that PyTorch pickled, of which only tensors are ever loaded.

    Args:
        source: the file; or a folder or a Hub id that has one called ``filename``.

    Raises:
        ValueError: there is no such file, or it holds more than tensors.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / filename
    elif not path.is_file() and path.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, filename, revision=revision))
    if not path.is_file():
        raise ValueError(f"{path} is not there; accepted are a file, or a folder or Hub id with {filename}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which could run code; save its state as safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}; accepted is a state dict")
    return dict(state)


def from_state(cls: Any, config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, **arguments: Any) -> nn.Module:
    """A model ``cls(config, **arguments)`` of transformers with the weights of ``state``.

    Raises:
        ValueError: names or shapes differ.
    """
    # from_pretrained draws no initial weights first, which would take long and move the caller's random state.
    try:
        model, info = cls.from_pretrained(
            None, **arguments, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # shapes
        raise ValueError(f"weights that do not fit a {cls.__name__}: {error}") from error
    if wrong := {key: sorted(map(str, names))[:3] for key, names in info.items() if names}:
        raise ValueError(f"weights that do not fit a {cls.__name__}: {wrong}")
    return model


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries that begin with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers that are called ``prefix`` and an index."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def folded(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight ``(D,)`` and bias ``()`` of linear layers ``layers.<i>`` in a row that end in one number.

    The heads of the aesthetic predictor and of ImageReward have dropout between their layers and no nonlinearity, so
    outside training they are affine.

    Raises:
        ValueError: other entries, layers that do not fit together, more than one output.
    """
    indices = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
    if not indices or set(state) != {f"layers.{i}.{name}" for i in indices for name in ("weight", "bias")}:
        raise ValueError(f"a head of {sorted(state)}; accepted are weights and biases of linear layers.<i>")
    weight = torch.eye(state[f"layers.{indices[0]}.weight"].shape[1], dtype=torch.float64)
    bias = weight.new_zeros(len(weight))
    for i in indices:
        w, b = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
        if w.shape[1] != len(weight):
            raise ValueError(f"a head whose layers.{i} takes {w.shape[1]} values and is given {len(weight)}")
        weight, bias = w @ weight, w @ bias + b
    if len(weight) != 1:
        raise ValueError(f"a head with {len(weight)} outputs; accepted is one")
    return weight[0].float(), bias[0].float()
