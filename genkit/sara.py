"""SaRA: fine-tuning of a network's smallest weights alone, in place, with nothing added to its inference.

Any optimiser and training loop will do; in a recipe it is ``adapter: {kind: sara}``.

>>> import tempfile
>>> from genkit.sara_files import SparseAdapter, load_sara
>>> network, x = nn.Linear(64, 64), torch.ones(1, 64)
>>> base = nn.Linear(64, 64)
>>> _ = base.load_state_dict(network.state_dict())
>>> layers = add_sara(network, num_params=400)
>>> optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
>>> network(x).square().mean().backward()
>>> optimizer.step()
>>> with tempfile.TemporaryDirectory() as folder:
...     applied = load_sara(base, SparseAdapter.of(network).save(folder))
>>> bool(torch.equal(base(x), network(x)))
True
>>> applied.undo()
>>> with without_sara(network):
...     bool(torch.equal(base(x), network(x)))
True
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genkit._smallest import smallest

PUBLISHED_THRESHOLD = 2e-3
_TUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FEW = 100  # selected entries below which a matrix has no rank worth lowering
_HASHED = (torch.float32, torch.bfloat16, torch.float16)


class _Selected(torch.autograd.Function):
    """``weight`` itself, whose gradient is gathered at ``index``: the dense one is freed where it arises."""

    @staticmethod
    def forward(ctx, delta: Tensor, weight: Tensor, index: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(index, active, delta)  # the last so that autograd sees when it was changed meanwhile
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        index, active, delta = ctx.saved_tensors
        return gradient.reshape(-1)[index].to(delta.dtype) * active, None, None, None


class Sara(nn.Module):
    """The parametrisation of one weight: ``P = P0`` but at its selected places, where ``P = P0 + delta``.

    ``delta`` is all that trains, in float32 at least: in half precision its updates would be lost. ``P`` is kept in the
    storage of ``P0``, so that neither a dense copy nor a dense gradient outlives a layer; :attr:`base` holds what it
    replaces. Switched off, the weight is ``P0`` exactly. ``network.to(torch.bfloat16)`` leaves ``delta`` as it is.

    Args:
        weight: of any shape.
        index: the places, in the flattened weight.
        threshold: below which all of them are.

    Attributes:
        active: which of the places still train; see :func:`shrink`.
        hashes: of ``P0``, by the dtype that it is seen in.
    """

    index: Tensor
    base: Tensor
    active: Tensor
    trained_buffers = ("active",)

    def __init__(self, weight: Tensor, index: Tensor, threshold: float):
        super().__init__()
        self.threshold = threshold
        selected = weight.detach().reshape(-1)[index].clone()
        self.register_buffer("index", index)
        self.register_buffer("base", selected)
        self.register_buffer("active", torch.ones_like(index, dtype=torch.bool))
        self.delta = nn.Parameter(torch.zeros_like(selected, dtype=torch.promote_types(weight.dtype, torch.float32)))
        self.hashes = hashes(weight)
        self.enabled = True

    @property
    def values(self) -> Tensor:
        """The selected entries as they are now, in the dtype of ``delta``; differentiable."""
        return self.base.to(self.delta.dtype) + self.delta

    def _apply(self, fn, recurse=True):
        before = self.delta.detach()
        super()._apply(fn, recurse)
        if self.delta.dtype.itemsize < before.dtype.itemsize:  # the weight may go to half precision, not what trains
            self.delta.data = before.to(self.delta.device)
        return self

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return self._copy(weight, self.base)
        if torch._C._are_functorch_transforms_active():  # these let nobody write into a weight
            delta = torch.where(self.active, self.delta, self.delta.detach())
            return self._copy(weight, self.base.to(delta.dtype) + delta)
        self.write(weight)
        return _Selected.apply(self.delta, weight, self.index, self.active)

    def _copy(self, weight: Tensor, entries: Tensor) -> Tensor:
        view, places = at(weight.detach(), self.index)
        return view.index_put(places, entries.to(weight.dtype)).view(weight.shape)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Put the selected entries into the storage of ``weight``."""
        # Past autograd's count of changes: within a loss the same values are written again at every call.
        view, places = at(weight.data, self.index)
        view[places] = self.values.to(weight.dtype)


def at(weight: Tensor, index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A view of ``weight``, and where in it the places ``index`` of the flattened one are, however it is laid out."""
    if weight.is_contiguous():
        return weight.view(-1), (index,)
    return weight, torch.unravel_index(index.long(), weight.shape)  # such as channels_last


def hashes(weight: Tensor) -> dict[str, str]:
    """What ``weight`` is known by, in each of the dtypes that it may be loaded in."""
    return {str(dtype).removeprefix("torch."): fingerprint(weight.to(dtype)) for dtype in _HASHED}


def fingerprint(weight: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of its shape and entries."""
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def add_sara(
    network: nn.Module,
    *,
    threshold: float | None = None,
    num_params: int | None = None,
    target_modules: Iterable[str] | None = None,
    exclude_modules: Iterable[str] = (),
    skip: Iterable[nn.Module] = (),
) -> dict[str, Sara]:
    """Make the entries with ``|w| < threshold`` the only ones of ``network`` that train; all others are frozen.

    ``network`` computes what it did, to the bit. Weights are those of linear layers and convolutions; biases, norms and
    embeddings are none of them, nor are layers with another parametrisation of torch's. By default a weight all of
    whose entries are below the threshold is left out, as that of a layer which starts at zero. Weights that layers
    share are selected, and trained, once.

    Args:
        threshold: compared in float32; 2e-3 where neither is given.
        num_params: instead of it, how many entries at most: the threshold is the next larger entry.
        target_modules: endings of the layers' names; all layers by default.
        exclude_modules: endings of names that are left out.
        skip: modules that are left out with all they hold, as those that train whole.

    Returns:
        The parametrisations by the names of their weights.

    Raises:
        ValueError: both of ``threshold`` and ``num_params``; a name that no layer has; a threshold that selects nothing
            or everything; a network that has one already.

    Source: Hu et al., "SaRA: high-efficient diffusion model fine-tuning with progressive sparse low-rank adaptation",
    arXiv 2409.06633, section 3. There the first weights of a run have lost their sign, in the code that was released.
    """
    if threshold is not None and num_params is not None:
        raise ValueError(f"threshold={threshold} and num_params={num_params} both say what is selected; set one")
    if sara_layers(network):
        raise ValueError(f"{type(network).__name__} has a SaRA already; remove_sara(network) takes it off")
    layers = _targets(network, target_modules, exclude_modules, skip)
    weights = {id(module.weight): module.weight for module in layers.values()}
    wanted = PUBLISHED_THRESHOLD if threshold is None else threshold
    kept, limit = smallest(list(weights.values()), wanted, num_params, everything=target_modules is not None)
    network.requires_grad_(False)
    made: dict[int, Sara] = {}
    for weight in kept:
        (index,) = (weight.detach().reshape(-1).float().abs() < limit).nonzero(as_tuple=True)
        if len(index):
            narrow = torch.int32 if weight.numel() < 2**31 else torch.int64
            made[id(weight)] = Sara(weight, index.to(narrow), limit)
    for module in layers.values():
        if (sara := made.get(id(module.weight))) is not None:
            parametrize.register_parametrization(module, "weight", sara)
    return sara_layers(network)


def _targets(network, target_modules, exclude_modules, skip) -> dict[str, Any]:
    """The layers to select from, by name."""
    inside = {id(m) for module in skip for m in module.modules()}
    known = {
        plain(name): module
        for name, module in network.named_modules()
        if isinstance(module, _TUNABLE)
        and ".lora_" not in f".{name}"
        and id(module) not in inside
        and not parametrize.is_parametrized(module)
    }

    def ending(name: str, endings: Iterable[str]) -> bool:
        return any(name == end or name.endswith(f".{end}") for end in endings)

    given = {"target_modules": list(target_modules or ()), "exclude_modules": list(exclude_modules)}
    for setting, endings in given.items():
        for end in endings:
            if not any(ending(name, [end]) for name in known):
                found = sorted({".".join(n.split(".")[-2:]) if n[-1].isdigit() else n.split(".")[-1] for n in known})
                raise ValueError(
                    f"{setting}={end!r} matches no layer of {type(network).__name__}; its layers end in "
                    f"{', '.join(found)}"
                )
    targets = given["target_modules"]
    return {
        name: module
        for name, module in known.items()
        if (not targets or ending(name, targets)) and not ending(name, given["exclude_modules"])
    }


def plain(name: str) -> str:
    """The name that a module or weight has without PEFT."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def sara_layers(network: nn.Module) -> dict[str, Sara]:
    """The parametrisations of ``network`` by the names of their weights; one that layers share by its first."""
    found: dict[Sara, str] = {}
    for name, _, sara in _parametrised(network):
        found.setdefault(sara, f"{plain(name)}.weight".lstrip("."))
    return {name: sara for sara, name in found.items()}


def _parametrised(network: nn.Module) -> Iterator[tuple[str, Any, Sara]]:
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            (sara, *_) = module.parametrizations["weight"]  # type: ignore[index]
            if isinstance(sara, Sara):
                yield name, module, sara


@contextmanager
def without_sara(network: nn.Module) -> Iterator[None]:
    """Within, the network is what it was before :func:`add_sara`, to the bit."""
    layers = list(sara_layers(network).values())
    before = [sara.enabled for sara in layers]
    try:
        for sara in layers:
            sara.enabled = False
        yield
    finally:
        for sara, enabled in zip(layers, before, strict=True):
            sara.enabled = enabled


def merge_sara(network: nn.Module) -> None:
    """Leave the trained weights where they are, and make ``network`` one without a parametrisation."""
    _take_off(network, merged=True)


def remove_sara(network: nn.Module) -> None:
    """Make ``network`` what it was before :func:`add_sara`, to the bit; all of it is frozen."""
    _take_off(network, merged=False)


@torch.no_grad()
def _take_off(network: nn.Module, merged: bool) -> None:
    for _, module, sara in list(_parametrised(network)):
        weight = module.parametrizations.weight.original
        if merged:
            sara.write(weight)
        else:
            view, places = at(weight.data, sara.index)
            view[places] = sara.base.to(weight.dtype)
        # Not by torch's remove_parametrizations: it changes the module's class, which copies of the network share.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        module.register_parameter("weight", weight)


@torch.no_grad()
def shrink(network: nn.Module) -> tuple[int, int]:
    """Progressive adjustment: train on only those of the places that are still below the threshold.

    ``M <- M and |P| < threshold``; what leaves keeps its value. Of most optimisers the state is to be cleared at the
    same time: a running mean would move what has no gradient any more. So would weight decay, which must be 0.

    Returns:
        How many places train, and how many did.
    """
    layers = list(sara_layers(network).values())
    before = sum(int(sara.active.sum()) for sara in layers)
    for sara in layers:
        sara.active &= sara.values.float().abs() < sara.threshold
    return sum(int(sara.active.sum()) for sara in layers), before


RankTarget = Literal["weight", "delta"]


@torch.no_grad()
def add_rank_gradient(sara: Sara, shape: torch.Size, strength: float, target: RankTarget = "weight") -> None:
    """Add to ``delta.grad`` that of ``strength |A|_*``, the nuclear norm of ``A = P * M``, or of ``(P - P0) * M``.

    ``A`` is the weight as a matrix ``(outputs, -1)`` with zeros where nothing is selected, ``A = U S V'``, and the
    (sub)gradient ``U V'`` at the places that train, in float32; of singular values below ``1e-6`` of the largest
    nothing, where a derivative of the decomposition would be infinite.

    Source: Hu et al., arXiv 2409.06633, section 3.3. The released code writes this gradient to a copy, so that the term
    does nothing there.
    """
    entries = (sara.values if target == "weight" else sara.delta).to(torch.promote_types(sara.delta.dtype, torch.float))
    matrix = entries.new_zeros(shape.numel())
    matrix[sara.index] = entries
    u, s, v = torch.linalg.svd(matrix.view(shape[0], -1), full_matrices=False)
    kept = s > 1e-6 * s[0]
    gradient = (u * kept) @ v
    value = strength * gradient.reshape(-1)[sara.index] * sara.active
    if sara.delta.grad is None:
        sara.delta.grad = torch.zeros_like(sara.delta)
    sara.delta.grad += value.to(sara.delta.dtype)


def lowerable(network: nn.Module) -> list[tuple[Sara, torch.Size]]:
    """What :func:`add_rank_gradient` may be given: layers with at least 100 selected entries."""
    shapes = {sara: module.parametrizations.weight.original.shape for _, module, sara in _parametrised(network)}
    return [(sara, shape) for sara, shape in shapes.items() if len(sara.index) >= _FEW]
