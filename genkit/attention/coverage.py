"""Where a model computes attention, and which of these places a backend can be put into."""

import re
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType
from typing import Any, Literal

from torch import nn

_DIRECT, _DISPATCH, _INTERFACE = "scaled_dot_product_attention", "dispatch_attention_fn", "ALL_ATTENTION_FUNCTIONS"

# How attention is sent to a backend: by the setting that Diffusers' processors have, by Transformers' interface, or by
# answering the module's own calls of PyTorch's attention.
Way = Literal["dispatcher", "interface", "rerouted"]


@dataclass(frozen=True)
class AttentionModule:
    """One module that computes attention: its ``name`` in the model, its class, that of its processor if it has one.

    ``way`` is how a backend gets there; ``None`` where none does, and then ``reason`` says why.
    """

    name: str
    kind: str
    processor: str | None
    way: Way | None
    reason: str
    module: nn.Module = field(repr=False, compare=False)


class Coverage(list[AttentionModule]):
    """The attention of a model, a record a module; printed, it is a table."""

    @property
    def left_out(self) -> "Coverage":
        """Those that no backend gets into."""
        return Coverage(record for record in self if record.way is None)

    def __str__(self) -> str:
        if not self:
            return "no attention"
        rows = [(r.name or "(the model)", r.kind, r.processor or "", r.way or "left out", r.reason) for r in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def attention_coverage(model: Any, backend: str = "genkit") -> Coverage:
    """Which attention modules of ``model`` are sent to ``backend`` by :func:`genkit.attention.use`, and which are not.

    Left out are modules that compute attention by steps of their own (also ``torch.nn.MultiheadAttention``), and those
    whose processor takes no other backend than the one it was written for.

    Args:
        model: a network of Diffusers or Transformers, a pipeline, or a module that contains such.
        backend: its name.

    Raises:
        ValueError: ``model`` is none of these.
    """
    found = Coverage()
    for prefix, network in networks(model):
        found += covered(network, backend, prefix)
    first = {id(record.module): record for record in reversed(found)}  # components may share a network
    return Coverage(record for record in found if record is first[id(record.module)])


def networks(model: Any) -> list[tuple[str, nn.Module]]:
    """``(name, network)`` of a pipeline's networks, or the model by itself, called ``""``."""
    if isinstance(model, nn.Module):
        return [("", model)]
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise ValueError(f"model is a {type(model).__name__}; expected a torch.nn.Module or a pipeline")
    return [(name, part) for name, part in components.items() if isinstance(part, nn.Module)]


def covered(network: nn.Module, backend: str, prefix: str = "") -> Coverage:
    """As :func:`attention_coverage`, of one network, which is called ``prefix``."""
    named = [(".".join(filter(None, (prefix, name))), module) for name, module in network.named_modules()]
    parts = {id(module): {id(part) for part in module.modules()} - {id(module)} for _, module in named}
    ways = {id(module): _way(module, backend) for _, module in named}
    reached = {key for key, (way, _) in ways.items() if way is not None}
    within = set().union(*(parts[key] for key in reached))
    alike = {id(module) for _, module in named if _looks_like_attention(module)}
    # What another's processor is made of is no attention by itself.
    alike -= {id(getattr(module, "processor", None)) for _, module in named}
    found = Coverage()
    for name, module in named:
        way, reason = ways[id(module)]
        inner = parts[id(module)]
        left = id(module) in alike and id(module) not in within and not inner & (reached | alike)
        if way is not None or left:
            processor = getattr(module, "processor", None)
            kinds = type(module).__name__, None if processor is None else type(processor).__name__
            found.append(AttentionModule(name, *kinds, way, reason, module))
    return found


def _way(module: nn.Module, backend: str) -> tuple[Way | None, str]:
    from genkit._diffusers import accepts_backend, attention_processor, has_backend

    if isinstance(module, nn.MultiheadAttention):
        return None, "PyTorch computes it within one function"
    processor = attention_processor(module)
    if processor is not None and has_backend(processor):
        if accepts_backend(processor, backend):
            return "dispatcher", ""
        return None, f"{type(processor).__name__} takes no other backend than its own"
    called = calls(module)
    if _INTERFACE in called:
        return "interface", ""
    if not called:
        return None, "computes attention by steps of its own" if processor is None else "its processor has no backends"
    if "forward" in vars(module):
        return None, "its forward was replaced on the module itself (by a hook of accelerate?)"
    return "rerouted", ""


def calls(module: nn.Module) -> set[str]:
    """Which of the doors to attention the code of a module's forward, or of its processor's, goes through.

    Functions and methods of the same library that are called there are followed.
    """
    owners: tuple[Any, Any] = type(module), type(getattr(module, "processor", None))
    return _calls(owners[0], "forward") | _calls(owners[1], "__call__")


def asks_dispatcher(module: nn.Module) -> bool:
    """Whether the code of a module's forward calls Diffusers' dispatcher."""
    return _DISPATCH in calls(module)


@cache
def _calls(owner: Any, entry: str) -> set[str]:
    found: set[str] = set()
    todo, seen = [getattr(owner, entry, None)], set()
    while todo:
        function = _plain(todo.pop())
        if function is None or function in seen:
            continue
        seen.add(function)
        library = function.__module__.partition(".")[0]
        for name in _names(function.__code__):
            if name in (_DIRECT, _DISPATCH, _INTERFACE):
                found.add(name)
                continue
            there = _plain(function.__globals__.get(name)) or _plain(getattr(owner, name, None))
            if there is not None and there.__module__.partition(".")[0] == library != "torch":
                todo.append(there)
    return found


def _plain(function: Any) -> FunctionType | None:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function if isinstance(function, FunctionType) else None


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _looks_like_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or re.search("Attention|Attn", type(module).__name__) is not None
