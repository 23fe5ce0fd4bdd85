"""Where a model computes attention, and which of these places a backend can be put into."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

from torch import jit, nn
from torch.nn import functional as F

_DIRECT, _DISPATCH, _INTERFACE = "scaled_dot_product_attention", "dispatch_attention_fn", "ALL_ATTENTION_FUNCTIONS"

# How attention is sent to a backend: by the setting that Diffusers' processors have, by Transformers' interface, or by
# answering the module's own calls of PyTorch's attention.
Way = Literal["dispatcher", "interface", "rerouted"]


@dataclass(frozen=True)
class AttentionModule:
    """One module that computes attention: its ``name`` in the model, its class, that of its processor if it has one.

    ``way`` is how a backend gets there; ``None`` where none does, and then ``reason`` says why. It also says what a
    backend that gets there lacks.
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
    from genkit.attention.demands import lacking

    found = Coverage()
    for prefix, network in networks(model):
        for record in covered(network, backend, prefix):
            found.append(replace(record, reason=lacking(backend, record) or record.reason))
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
    if isinstance(module, jit.ScriptModule):
        return None, "TorchScript computes it"
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

    Functions and methods that are called there are followed, also those of base classes, other libraries, and those
    kept as attributes. PyTorch's function is known under any name.
    """
    return _doors(module, "forward") | _doors(getattr(module, "processor", None), "__call__")


def asks_dispatcher(module: nn.Module) -> bool:
    """Whether the code of a module's forward calls Diffusers' dispatcher."""
    return _DISPATCH in calls(module)


def _doors(owner: Any, entry: str) -> set[str]:
    attributes = getattr(owner, "__dict__", {}).items()
    kept = {name: f for name, f in attributes if name != "forward" and _plain(f) is not None}
    # What an instance keeps may hold on to tensors, and had better not be cached.
    kind: Any = type(owner)
    return _search(kind, entry, kept) if kept else _doors_of_class(kind, entry)


@cache
def _doors_of_class(owner: type, entry: str) -> set[str]:
    return _search(owner, entry, {})


def _search(owner: type, entry: str, kept: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    todo, seen = [_plain(getattr(owner, entry, None))], set()
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        if function is F.scaled_dot_product_attention:
            found.add(_DIRECT)
        seen.add(function)
        if not isinstance(function, FunctionType):
            continue
        for name, there in _named(function, owner, kept):
            if name in (_DISPATCH, _INTERFACE) or (name == _DIRECT and not there):
                found.add(name)
            else:
                direct = F.scaled_dot_product_attention
                todo += [other for other in there if other is direct or not _outside(other.__module__)]
    return found


def _named(function: FunctionType, owner: type, kept: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Every name in the code of a function, with the functions that it may stand for."""
    code = function.__code__
    names = _names(code)
    enclosed = {name: _content(cell) for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
    known = {**function.__globals__, **enclosed}
    modules = [m for m in map(known.get, names) if isinstance(m, ModuleType) and not _outside(m.__name__)]
    bases = [vars(base) for base in _after(owner, enclosed.get("__class__"))] if "super" in names else []
    for name in names | set(enclosed):
        inherited = next((base[name] for base in bases if name in base), None)
        # vars: to ask a module for a name may import
        of_modules = (vars(module).get(name) for module in modules)
        values = (known.get(name), kept.get(name), getattr(owner, name, None), inherited, *of_modules)
        yield name, [plain for value in values if (plain := _plain(value)) is not None]


def _after(owner: type, base: Any) -> tuple[type, ...]:
    order = owner.__mro__
    return order[order.index(base) + 1 :] if base in order else ()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None


def _outside(module: str | None) -> bool:
    """Of libraries in which no network's attention is written."""
    library = (module or "").partition(".")[0]
    return library == "torch" or library in sys.stdlib_module_names


def _plain(function: Any) -> Any:
    """The Python function, or PyTorch's attention, in decorators, methods and ``partial``; ``None`` for all else."""
    while True:
        if isinstance(function, partial):
            function = function.func
        elif isinstance(function, MethodType):
            function = function.__func__
        elif hasattr(type(function), "__get__") and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            break
    return function if isinstance(function, FunctionType) or function is F.scaled_dot_product_attention else None


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _looks_like_attention(module: nn.Module) -> bool:
    kind = module.original_name if isinstance(module, jit.ScriptModule) else type(module).__name__
    return isinstance(module, nn.MultiheadAttention) or re.search("Attention|Attn", kind) is not None
