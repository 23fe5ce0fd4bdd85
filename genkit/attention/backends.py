"""``use``: which kernel computes the attention of unmodified networks."""

import logging
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import nn

from genkit import kernels
from genkit._diffusers import add_backend, attention_processor, backend_function, set_backend
from genkit.attention import conventions
from genkit.attention.coverage import Coverage, asks_dispatcher, covered, networks
from genkit.attention.probing import OURS, compute, head_size, names, problem
from genkit.attention.rerouting import reroute
from genkit.registry import unknown

logger = logging.getLogger("genkit.attention")

Size = tuple[torch.device, torch.dtype, int]

# Backends that Transformers has by itself. Its own handle padding and caches better than ours around the same kernels.
_OF_TRANSFORMERS = {"flash": "flash_attention_2", "_flash_3": "flash_attention_3", "flex": "flex_attention"}


class Use:
    """A choice of backends that has been applied: by ``backend``, for each network its name.

    As a context manager, and by :meth:`restore`, it puts everything back as it was. Choices made on top of each other
    are undone in the reverse order.
    """

    def __init__(self, backend: dict[str, str], coverage: Coverage, undo: ExitStack):
        self.backend, self.coverage, self._undo = backend, coverage, undo
        self._classes = [(record.module, type(record.module)) for record in coverage if record.way == "rerouted"]

    def restore(self) -> None:
        """Put everything back; a second time does nothing.

        Raises:
            RuntimeError: a later change of a module's class, as by another choice, was not undone before.
        """
        for module, kind in self._classes:
            if type(module) is not kind:
                raise RuntimeError(
                    f"the class of a {kind.__name__} was changed later than its backend; undo that first"
                )
        self._classes = []
        self._undo.close()

    def __enter__(self) -> "Use":
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def use(model: Any, backend: str = "auto", *, tangent: bool = False) -> Use:
    """Compute the attention of ``model`` by ``backend``, from this call on, or within ``with use(...)``.

    >>> from genkit.attention import use
    >>> from genkit.testing import tiny
    >>> with use(tiny.pipeline("flux").transformer, "genkit") as chosen:
    ...     chosen.backend
    {'': 'genkit'}

    Backends are those of Diffusers by name (``native``, ``_native_math``, ``flash``, ``_flash_3``, ``sage``, ``flex``,
    ``xformers`` ...) and ``genkit``, :func:`genkit.attention.attention`. They get into Diffusers' networks with new and
    old processors, into Transformers' networks with their masks, and into modules that call PyTorch's attention
    themselves. ``auto`` takes for each network the one that is fastest: with tangents ``genkit``, otherwise cuDNN's on
    Hopper and Blackwell GPUs in half precision, else PyTorch's own choice; it logs what it took. Each is tried first,
    on the network's device, in its dtype and head sizes, so that what does not run says so here. Attention that cannot
    be reached is named in a warning, see :func:`~genkit.attention.attention_coverage`.

    Args:
        model: a network of Diffusers or Transformers, a pipeline (all its networks), or a module that contains such.
        backend: a name, or ``auto``.
        tangent: whether it will be differentiated forward (``torch.func.jvp``), which few backends can be.

    Raises:
        ValueError: an unknown name, a missing package, a backend that does not run here or, with ``tangent``, has no
            forward mode; another kind of ``model``.
        RuntimeError: this Diffusers keeps its backends in another way than those that genkit knows.
    """
    add_backend(OURS, conventions.as_diffusers)
    if backend not in ("auto", *names()):
        raise ValueError(unknown("backend", backend, ["auto", *names()]))
    chosen: dict[str, str] = {}
    coverage = Coverage()
    with ExitStack() as stack:
        for label, network in networks(model):
            called = label or type(network).__name__
            gradient = network.training and any(p.requires_grad for p in network.parameters())
            sizes = _sizes(network)
            name = backend
            if backend == "auto":
                asked = (tangent, gradient, kernels.mode(), torch.are_deterministic_algorithms_enabled())
                name, reason = _fastest(sizes, *asked)
                if sizes:
                    _say(logging.INFO, f"attention of {called}: auto takes {name!r}, {reason}")
            _try(called, name, sizes, tangent, gradient)
            chosen[label] = name
            records = covered(network, name, label)
            _apply(network, name, records, stack)
            _warn(called, name, sizes, records)
            coverage += records
        undo = stack.pop_all()
    return Use(chosen, coverage, undo)


def _sizes(network: nn.Module) -> tuple[Size, ...]:
    """Where, in what and with how many channels a head the attention of ``network`` computes."""
    hooks = (getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in network.modules())
    device = next((torch.device(place) for place in hooks if place is not None), None)
    whole = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    sizes = set()
    for record in covered(network, OURS):
        if record.way is None:
            continue
        weight = next((p for p in record.module.parameters() if p.is_floating_point()), whole)
        place = device or weight.device
        if place.type == "meta":
            raise ValueError(f"weights of {record.name} are on 'meta'; load them before choosing a backend")
        sizes.add((place, weight.dtype, head_size(record.module)))
    return tuple(sorted(sizes, key=str))


def _try(called: str, name: str, sizes: tuple[Size, ...], tangent: bool, gradient: bool) -> None:
    compute(name)  # also where there is no attention to try it on
    for device, dtype, size in sizes:
        reason = problem(name, device, dtype, size, tangent=tangent, gradient=gradient)
        if reason is not None:
            remedy = f"; for tangents take {OURS!r}" if tangent and name != OURS else ""
            raise ValueError(
                f"backend={name!r} does not compute attention of {called}, on {device} in {dtype} with {size} channels"
                f" a head{' and tangents' if tangent else ''}: {reason}{remedy}; 'genkit doctor' shows what works here"
            )


@cache
def _fastest(sizes: tuple[Size, ...], tangent: bool, gradient: bool, mode: str, deterministic: bool) -> tuple[str, str]:
    if tangent:
        fused = sizes and all(kernels.fused(device) for device, _, _ in sizes)
        return OURS, f"which carries tangents, and is {'fused' if fused else 'eager'} here"
    reasons = ["where PyTorch chooses among its kernels"]
    if sizes and all(_hopper_or_blackwell(device) for device, _, _ in sizes):
        tried = ((size, masked) for size in sizes for masked in (False, True))
        faults = (problem("_native_cudnn", *size, gradient=gradient, masked=masked) for size, masked in tried)
        fault = "not known to be deterministic" if deterministic else next(filter(None, faults), None)
        if fault is None:
            return "_native_cudnn", "the fastest on Hopper and Blackwell GPUs"
        reasons.append(f"cuDNN's is left out ({fault})")
    return "native", "; ".join(reasons)


def _hopper_or_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _apply(network: nn.Module, name: str, records: Coverage, stack: ExitStack) -> None:
    member, function = None, compute(name)
    if any(record.way != "interface" for record in records):
        member = backend_function(name)[0]
    for record in records:
        if record.way == "dispatcher":
            stack.callback(set_backend(attention_processor(record.module), member))
        elif record.way == "rerouted":
            before = type(record.module)
            reroute(record.module, name, function, member if asks_dispatcher(record.module) else None)
            stack.callback(setattr, record.module, "__class__", before)
    if any(record.way == "interface" for record in records):
        from genkit.attention.interface import implement

        implement(network, name, _OF_TRANSFORMERS.get(name), function, stack)


def _warn(called: str, name: str, sizes: tuple[Size, ...], records: Coverage) -> None:
    for device, dtype, size in sizes if name == OURS else ():
        why = None
        if device.type == "cuda" and not kernels.fused(device):
            why = kernels.obstacle(device.type) or f"GENKIT_KERNELS={kernels.mode()}"
        elif device.type == "cuda" and (size % 8 or not 16 <= size <= 256 or dtype == torch.float64):
            why = f"{size} channels a head in {dtype}; there are kernels for multiples of 8 from 16 to 256, not float64"
        if why is not None:
            _say(logging.WARNING, f"attention of {called} by {name!r} is eager on {device}, not fused: {why}")
    if left := records.left_out:
        listed = ", ".join(f"{r.name or '(itself)'} ({r.processor or r.kind}: {r.reason})" for r in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        _say(logging.WARNING, f"attention backend {name!r} does not reach, in {called}: {listed}{more}")


@cache
def _say(level: int, message: str) -> None:
    """Log once."""
    logger.log(level, message)
