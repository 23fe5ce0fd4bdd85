"""What is installed, what the machine has, and the command that adds what is missing."""

import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "pydantic", "omegaconf")
# Package -> (import name, what it is for, extra that brings it)
OPTIONAL = {
    "torchvision": ("torchvision", "Inception and LPIPS backbones, clean-fid", "eval"),
    "torchmetrics": ("torchmetrics", "metrics beside our own", "eval"),
    "clean-fid": ("cleanfid", "clean-fid's protocol", "eval"),
    "datasets": ("datasets", "data from the datasets library", "train"),
    "pytorch-optimizer": ("pytorch_optimizer", "optimisers beyond torch's", "train"),
    "tensorboard": ("tensorboard", "report_to=tensorboard", "train"),
    "xformers": ("xformers", "attention backend xformers", "xformers"),
    "triton": ("triton", "fused kernels (comes with CUDA builds of torch)", None),
    "flash-attn": ("flash_attn", "attention backend flash", None),
    "wandb": ("wandb", "report_to=wandb", None),
    "trackio": ("trackio", "report_to=trackio", None),
}


def install_command(package: str) -> str:
    """The command that installs an optional package, by the extra that brings it where there is one."""
    extra = OPTIONAL[package][2]
    return f"pip install 'genkit-diffusion[{extra}]'" if extra else f"pip install {package}"


def versions() -> list[tuple[str, str | None, str]]:
    """``(package, version or None, what it is for or how to install it)`` for everything genkit can use."""
    rows: list[tuple[str, str | None, str]] = [(p, _version(p), "required") for p in REQUIRED]
    for package, (module, purpose, _) in OPTIONAL.items():
        found = _version(package) if importlib.util.find_spec(module) else None
        rows.append((package, found, purpose if found else f"{purpose}: {install_command(package)}"))
    return rows


def devices() -> list[tuple[str, str]]:
    """``(device, description)`` of what torch can compute on."""
    import torch

    rows = [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU"))
    return rows


def attention_backends() -> list[tuple[str, bool, str]]:
    """``(backend, works here, remark)``: each that :func:`genkit.attention.use` takes is tried on the best device.

    Ours has two rows, fused and eager. The last row says whether forward-mode derivatives go through attention. Kernels
    that would be downloaded from the Hub are not tried.
    """
    import torch

    from genkit import kernels
    from genkit.attention import probing

    device = torch.device(devices()[-1][0] if len(devices()) > 1 else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    where = f"on {device}, {str(dtype).removeprefix('torch.')}"

    def row(name: str, backend: str, mode: kernels.Mode, **asked: bool) -> tuple[str, bool, str]:
        try:
            with kernels.choose(mode):
                reason = probing.problem(backend, device, dtype, 64, **asked)
        except (RuntimeError, ValueError) as error:
            reason = str(error).removeprefix(f"backend={backend!r}: ")
        return name, reason is None, where if reason is None else f"{where}: {reason}"

    rows = [
        (name, False, "not tried: it downloads a kernel from the Hub")
        if name.endswith("_hub")
        else row(name, name, "auto")
        for name in probing.names()
        if name != probing.OURS
    ]
    fused = kernels.obstacle(device)
    rows.append(("genkit, fused", False, fused) if fused else row("genkit, fused", probing.OURS, "on"))
    rows.append(row("genkit, eager", probing.OURS, "off"))
    return [*rows, row("forward mode", probing.OURS, "auto", tangent=True, gradient=True)]


def model_attention(path: Path) -> list[tuple[str, str, str, str, str]]:
    """``(module, class, processor, how a backend reaches it or "no", remark)`` of a saved pipeline or network.

    Networks are built without their weights where they can be.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: it is of a kind that neither Diffusers nor Transformers knows.
    """
    from diffusers import AutoModel, DiffusionPipeline

    from genkit._diffusers import without_loading_bars
    from genkit.attention import attention_coverage

    check_model(path)
    with without_loading_bars():
        try:
            model = _without_weights(path)
        except Exception:  # of a kind that is not met here, or it computes with weights when it is built
            whole = (path / "model_index.json").is_file()
            model = (DiffusionPipeline if whole else AutoModel).from_pretrained(str(path))
    coverage = attention_coverage(model)
    return [(r.name, r.kind, r.processor or "", r.way or "no", r.reason) for r in coverage]


def check_model(path: Path) -> None:
    """Raise ``FileNotFoundError`` where there is no saved pipeline or network."""
    if not path.is_dir():
        raise FileNotFoundError(f"model={str(path)!r} is not a folder")
    if not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        raise FileNotFoundError(f"model={str(path)!r} has neither a model_index.json nor a config.json")


def _without_weights(path: Path) -> Any:
    """A pipeline's networks as ``components``, or a network, on the meta device."""
    import diffusers
    import torch
    import transformers

    def build(folder: Path, kind: Any) -> Any:
        if kind.__module__.startswith("transformers."):
            return kind(kind.config_class.from_pretrained(str(folder)))
        return kind.from_config(kind.load_config(str(folder)))

    with torch.device("meta"):
        index = path / "model_index.json"
        if not index.is_file():
            config = json.loads((path / "config.json").read_text())
            if "_class_name" in config:
                return build(path, getattr(diffusers, config["_class_name"]))
            return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(str(path)))
        components = {}
        for name, entry in json.loads(index.read_text()).items():
            if name.startswith("_") or not isinstance(entry, list) or not entry[0]:
                continue
            library = getattr(diffusers.pipelines, entry[0], None) or importlib.import_module(entry[0])
            kind = getattr(library, entry[1])
            if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
                components[name] = build(path / name, kind)
    return SimpleNamespace(components=components)


def torchvision_problem() -> str | None:
    """Why the installed torchvision cannot be used, and what to do; ``None`` if it works or is absent."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        torch, vision = _version("torch"), _version("torchvision")
        return (
            f"torchvision {vision} does not match torch {torch} ({str(error).splitlines()[0]}); Diffusers and "
            "Transformers cannot be imported beside it. Reinstall both together (pip install --upgrade torch "
            "torchvision), or remove torchvision, which genkit does not need."
        )
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
