"""``use``: which kernel computes the attention of unmodified networks."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genkit import kernels
from genkit._diffusers import add_backend, attention_processor, backend_function, casting_dtype, set_backend
from genkit.attention import conventions
from genkit.attention.choices import Use
from genkit.attention.coverage import Coverage, asks_dispatcher, covered, networks
from genkit.attention.demands import OF_TRANSFORMERS, refusal
from genkit.attention.functional import _fused, fits
from genkit.attention.inputs import check
from genkit.attention.probing import OURS, compute, head_size, names, problem
from genkit.attention.rerouting import reroute
from genkit.registry import unknown

logger = logging.getLogger("genkit.attention")


class Size(NamedTuple):
    """Where, in what and with how many channels a head attention computes; ``assumed`` where no attribute says."""

    device: torch.device
    dtype: torch.dtype
    channels: int
    assumed: bool = False


_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def register_backend(name: str, function: Callable[..., torch.Tensor]) -> None:
    """Make your own attention a backend, by ``name``, of everything that :func:`use` gets into; once a process.

    It is called as ``function(query, key, value, ...)`` in Diffusers' convention: ``query`` ``(B, M, H, D)``, ``key``
    and ``value`` ``(B, N, H, D)``, and returns ``(B, M, H, D)``. Further arguments are given by name, those that its
    signature has (all, with ``**kwargs``); where a network asks for one that it lacks, that is an error:

    - ``attn_mask``: ``None``, boolean (True where attended) or added to scores; four axes that broadcast to
      ``(B, H, M, N)``;
    - ``dropout_p``, a float; ``is_causal``, only with ``M = N``; ``scale`` of scores, ``None`` for ``D ** -0.5``;
    - ``enable_gqa``: key and value have fewer heads, each for ``H / Hk`` neighbouring ones of query. Without it they
      are repeated beforehand.

    >>> from torch.nn import functional as F
    >>> from genkit.attention import register_backend
    >>> def mine(query, key, value, attn_mask=None, is_causal=False, scale=None):
    ...     q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    ...     o = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    ...     return o.transpose(1, 2)
    >>> register_backend("mine", mine)

    Raises:
        ValueError: a name that is no lower-case identifier, or that of another backend; the same function under its
            own name is fine.
        RuntimeError: this Diffusers keeps its backends in another way than those that genkit knows.
    """
    if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
        raise ValueError(f"name={name!r} is no name of a backend; expected letters in lower case, digits and _")
    if name in ("auto", OURS):
        raise ValueError(f"name={name!r} is an attention backend already; choose another name")
    if not callable(function):
        raise ValueError(f"function={function!r} cannot be called; expected function(query, key, value, ...)")
    add_backend(name, conventions.of_user(name, function))


def use(model: Any, backend: str = "auto", *, tangent: bool = False) -> Use:
    """Compute the attention of ``model`` by ``backend``, from this call on, or within ``with use(...)``.

    >>> from genkit.attention import use
    >>> from genkit.testing import tiny
    >>> with use(tiny.pipeline("flux").transformer, "genkit") as chosen:
    ...     chosen.backend
    {'': 'genkit'}

    Backends are those of Diffusers by name (``native``, ``_native_math``, ``flash``, ``_flash_3``, ``sage``, ``flex``,
    ``xformers`` ...), ``genkit``, :func:`genkit.attention.attention`, and yours, :func:`register_backend`. They get
    into Diffusers' networks with new and old processors, into Transformers' networks with their masks, and into modules
    that call PyTorch's attention themselves. ``auto`` takes for each network the one that is fastest: with tangents
    ``genkit``, otherwise cuDNN's on data-center Hopper and Blackwell GPUs in half precision, else PyTorch's own choice;
    it logs what it took. Each is tried first, on the network's device, in the dtype it computes in (that of an autocast
    that is active) and its head sizes, and asked for what the network's attention is set to in its present mode
    (dropout, soft caps), so that what does not run says so here. ``native`` without tangents is what networks run on
    anyway, and is not tried.

    Modules that attend by themselves are found by reading, not running, the code of their forward: names in it are
    looked up in its globals, closure, class, base classes and attributes, functions found so are read too, and
    PyTorch's attention is known under any of these names. What is called by an object of another kind, imported under
    another name within a function, or compiled by TorchScript is not seen. Attention that cannot be reached is named in
    a warning, see :func:`~genkit.attention.attention_coverage`, as is a network in which none was found.

    With gradient checkpointing the backward computes attention anew, and must run within the ``with`` too. Within,
    modules that call PyTorch's attention themselves have another class, so that they cannot be pickled (also by
    ``torch.save`` of a whole network); save a ``state_dict``, or restore before.

    Args:
        model: a network of Diffusers or Transformers, a pipeline (all its networks), or a module that contains such.
        backend: a name, or ``auto``.
        tangent: whether it will be differentiated forward (``torch.func.jvp``), which few backends can be.

    Raises:
        ValueError: an unknown name, a missing package, a backend that does not run here or, with ``tangent``, has no
            forward mode or reaches no attention at all; another kind of ``model``.
        RuntimeError: this Diffusers keeps its backends in another way than those that genkit knows.
    """
    add_backend(OURS, conventions.as_diffusers)
    if backend not in ("auto", *names()):
        raise ValueError(unknown("backend", backend, ["auto", *names()]))
    chosen: dict[str, str] = {}
    coverage = Coverage()
    changed: list[Any] = []
    with ExitStack() as stack:
        for label, network in networks(model):
            called = label or type(network).__name__
            gradient = network.training and any(p.requires_grad for p in network.parameters())
            name = backend
            sizes = () if name == "native" and not tangent else _sizes(network, called)
            if backend == "auto":
                asked = (tangent, gradient, kernels.mode(), torch.are_deterministic_algorithms_enabled())
                name, reason = _fastest(sizes, *asked)
                if not tangent and (why := refusal(name, covered(network, name, label))):
                    name, reason = "native", f"since {why}"
                if sizes:
                    _say(logging.INFO, f"attention of {called}: auto takes {name!r}, {reason}")
            _try(called, name, sizes, tangent, gradient)
            chosen[label] = name
            records = covered(network, name, label)
            if why := refusal(name, records):
                raise ValueError(f"backend={name!r} does not compute attention of {called}: {why}")
            changed += _apply(network, name, records, stack)
            _warn(called, name, sizes, records)
            coverage += records
        if tangent and len(coverage.left_out) == len(coverage):
            raise ValueError(
                f"tangent=True, and no attention of {type(model).__name__} was reached ({coverage}); if it has some, "
                "write it with genkit.attention.attention or torch.nn.functional.scaled_dot_product_attention"
            )
        undo = stack.pop_all()
    return Use(chosen, coverage, undo, changed)


def _sizes(network: nn.Module, called: str) -> tuple[Size, ...]:
    hooks = (getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in network.modules())
    device = next((torch.device(place) for place in hooks if place is not None), None)
    sizes = set()
    for record in covered(network, OURS):
        if record.way is None:
            continue
        module = record.module
        place = device or next((p.device for part in (module, network) for p in part.parameters()), torch.device("cpu"))
        if place.type == "meta":
            raise ValueError(f"weights of {record.name or called} are on 'meta'; load them before choosing a backend")
        channels, known = head_size(module)
        sizes.add(Size(place, _dtype(module, network, place), channels, not known))
    return tuple(sorted(sizes, key=str))


def _dtype(module: nn.Module, network: nn.Module, device: torch.device) -> torch.dtype:
    """What the attention of ``module`` computes in, which need not be what weights lie in (float8, integers)."""
    dtype = casting_dtype(module)
    if dtype is None:
        weights = (p.dtype for part in (module, network) for p in part.parameters())
        dtype = next((d for d in weights if d in _COMPUTE_DTYPES), casting_dtype(network) or torch.float32)
    if dtype != torch.float64 and torch.amp.is_autocast_available(device.type):
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
    return dtype


def _try(called: str, name: str, sizes: tuple[Size, ...], tangent: bool, gradient: bool) -> None:
    compute(name)  # also where there is no attention to try it on
    if name == "native" and not tangent:  # its word is PyTorch's, which networks take by themselves
        return
    for device, dtype, channels, assumed in sizes:
        reason = problem(name, device, dtype, channels, tangent=tangent, gradient=gradient)
        if reason is not None:
            remedy = f"; for tangents take {OURS!r}" if tangent and name != OURS else ""
            width = f"{channels} channels a head{' (assumed)' if assumed else ''}"
            raise ValueError(
                f"backend={name!r} does not compute attention of {called}, on {device} in {dtype} with {width}"
                f"{' and tangents' if tangent else ''}: {reason}{remedy}; 'genkit doctor' shows what works here"
            )


@cache
def _fastest(sizes: tuple[Size, ...], tangent: bool, gradient: bool, mode: str, deterministic: bool) -> tuple[str, str]:
    if tangent:
        fused = sizes and all(_eager_since(size) is None for size in sizes)
        return OURS, f"which carries tangents, and is {'fused' if fused else 'eager'} here"
    reasons = ["where PyTorch chooses among its kernels"]
    if sizes and all(_hopper_or_blackwell(size.device) for size in sizes):
        tried = ((size, masked) for size in sizes for masked in (False, True))
        faults = (problem("_native_cudnn", *size[:3], gradient=gradient, masked=masked) for size, masked in tried)
        fault = "not known to be deterministic" if deterministic else next(filter(None, faults), None)
        if fault is None:
            return "_native_cudnn", "the fastest on Hopper and Blackwell GPUs"
        reasons.append(f"cuDNN's is left out ({fault})")
    return "native", "; ".join(reasons)


def _hopper_or_blackwell(device: torch.device) -> bool:
    # Compute capability 12, of consumer's Blackwell, has other tensor cores, on which PyTorch does not prefer cuDNN's
    # kernels and where we have not measured them.
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _eager_since(size: Size) -> str | None:
    """Why ours is eager, by what itself goes by; ``None`` where a kernel computes it."""
    with FakeTensorMode():
        x = torch.empty(1, 1, 1, size.channels, device=size.device, dtype=size.dtype)
    if fits(x) and _fused(check(x, x, x, None, None, False, None)):
        return None
    chosen = f"GENKIT_KERNELS={kernels.mode()}"
    if kernels.mode() == "off" or not kernels.fused(size.device):
        return chosen if kernels.mode() == "off" else kernels.obstacle(size.device) or chosen
    width = f"{size.channels} channels a head{' (assumed)' if size.assumed else ''}"
    return (
        f"{width} in {size.dtype}; there are kernels for multiples of 8 from 16 to 256, not float64, in float32 as far "
        "as shared memory goes"
    )


def _apply(network: nn.Module, name: str, records: Coverage, stack: ExitStack) -> list[Any]:
    """What was changed: processors, modules and configs."""
    changed: list[Any] = []
    member, function = None, compute(name)
    if any(record.way != "interface" for record in records):
        member = backend_function(name)[0]
    for record in records:
        if record.way == "dispatcher":
            changed.append(processor := attention_processor(record.module))
            stack.callback(set_backend(processor, member))
        elif record.way == "rerouted":
            changed.append(record.module)
            before = type(record.module)
            reroute(record.module, name, function, member if asks_dispatcher(record.module) else None)
            stack.callback(setattr, record.module, "__class__", before)
    if any(record.way == "interface" for record in records):
        from genkit.attention.interface import implement

        changed += implement(network, name, OF_TRANSFORMERS.get(name), function, stack)
    return changed


def _warn(called: str, name: str, sizes: tuple[Size, ...], records: Coverage) -> None:
    for size in sizes if name == OURS else ():
        if size.device.type == "cuda" and (why := _eager_since(size)):
            _say(logging.WARNING, f"attention of {called} by {name!r} is eager on {size.device}, not fused: {why}")
    if not records:
        _say(logging.WARNING, f"attention backend {name!r} reaches nothing in {called}: no attention was found in it")
    if left := records.left_out:
        listed = ", ".join(f"{r.name or '(itself)'} ({r.processor or r.kind}: {r.reason})" for r in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        _say(logging.WARNING, f"attention backend {name!r} does not reach, in {called}: {listed}{more}")


@cache
def _say(level: int, message: str) -> None:
    """Log once."""
    logger.log(level, message)
