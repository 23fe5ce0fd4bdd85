"""Low-rank adapters through PEFT."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from genkit._flow_map_files import save_lora_weights
from genkit.denoisers import TwoTime
from genkit.denoisers.base import Denoiser
from genkit.denoisers.network import unwrap

# The projections of attention, by how Diffusers' networks and genkit's name them.
_ATTENTION = (("to_q", "to_k", "to_v", "to_out.0"), ("qkv", "proj"))


def base_network(student: Denoiser) -> nn.Module:
    """The network without the embedder of a second time."""
    return unwrap(student.network.network if isinstance(student, TwoTime) else student.module)


def add_lora(student: Denoiser, settings) -> None:
    """Put low-rank updates of rank ``rank`` and scale ``alpha / rank`` beside the weights of ``target_modules``.

    All else is frozen, except the embedder of the gap of a two-time student.

    Raises:
        ValueError: targets that match no layer.
    """
    network: Any = base_network(student)
    names = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    targets = settings.target_modules or _default(names)
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            endings = sorted({n.split(".")[-1] if not n[-1].isdigit() else ".".join(n.split(".")[-2:]) for n in names})
            raise ValueError(
                f"adapter.target_modules={target!r} matches no layer of {type(network).__name__}; "
                f"its layers end in {', '.join(endings)}"
            )
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, init_lora_weights=True)
    if hasattr(network, "add_adapter"):
        network.add_adapter(config)
    else:
        inject_adapter_in_model(config, network)
    if isinstance(student, TwoTime):
        student.network.gap_embedder.requires_grad_(True)


def _default(names: list[str]) -> list[str]:
    for endings in _ATTENTION:
        found = [e for e in endings if any(n.endswith(f".{e}") for n in names)]
        if found:
            return found
    raise ValueError("adapter.target_modules: the network has no attention known by name; name its layers")


def save_lora(student: Denoiser, folder: Path) -> Path:
    """Write the LoRA, with its alpha, as the file that ``pipe.load_lora_weights`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_lora_weights(folder, base_network(student), "default")
    return folder
