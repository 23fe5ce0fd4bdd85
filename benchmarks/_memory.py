"""How much memory computing takes, counted storage by storage, so that it is the same on every machine."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive:
    """Bytes of storages, each counted from when it is first seen until it is gone, and the most at a time."""

    def __init__(self, without: tuple[Tensor, ...] = ()):
        self.bytes = self.most = 0
        self._seen = {t.untyped_storage()._cdata for t in without}

    def add(self, tensor: Tensor, holder: object | None = None) -> None:
        """Count ``tensor``'s storage while it, or ``holder``, lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage if holder is None else holder, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


class Peak(TorchDispatchMode):
    """Within, all that operators make is counted in ``alive``."""

    def __init__(self, without: tuple[Tensor, ...]):
        super().__init__()
        self.alive = Alive(without)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.alive.add(leaf)
        return made
