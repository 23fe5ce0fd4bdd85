"""What is installed, what the machine has, and the command that adds what is missing."""

import importlib.metadata
import importlib.util
import platform

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
    """``(backend, works here, remark)``: each of torch's kernels is run once on the best device.

    The last row says whether forward-mode derivatives (``jvp: func``) go through attention, which needs ``math``.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = devices()[-1][0] if len(devices()) > 1 else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.float16
    q = torch.randn(1, 2, 16, 16, device=device, dtype=dtype)
    rows = []
    for backend in (
        SDPBackend.MATH,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ):
        name = backend.name.lower().removesuffix("_attention")
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            rows.append((name, True, f"torch, on {device}"))
        except RuntimeError as error:
            rows.append((name, False, f"torch, on {device}: {str(error).splitlines()[0][:60]}"))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(
                lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), (q,), (torch.ones_like(q),)
            )
        rows.append(("forward mode", True, "jvp: func works through the math backend"))
    except RuntimeError as error:
        rows.append(("forward mode", False, f"use jvp: finite_difference ({str(error).splitlines()[0][:60]})"))
    return rows


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
