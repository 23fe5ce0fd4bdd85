"""Lazy registration of every genkit module in ``sys.modules``.

Diffusers loads a component whose class lives outside Diffusers only if the class's module is *already* in
``sys.modules``. Importing all of genkit's modules eagerly would import torch, so each one is registered as a module
object that executes on the first attribute asked of it.
"""

import importlib.util
import pkgutil
import sys
import threading
from importlib.abc import Loader
from types import ModuleType

_lock = threading.RLock()


class _LazyModule(ModuleType):
    """A module that runs its source when the first attribute that it lacks is asked for."""

    def __getattr__(self, name: str):
        # Scanners of sys.modules (inspect, warnings, pytest) probe dunder names; they must not trigger imports.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            if type(self) is _LazyModule and not self.__dict__.get("_genkit_running"):
                self.__dict__["_genkit_running"] = True
                before = set(self.__dict__)
                try:
                    _loader(self).exec_module(self)
                except BaseException as error:
                    # Leave it as it was, so that the next access reports the same error, not a half-made module.
                    for key in set(self.__dict__) - before:
                        del self.__dict__[key]
                    from genkit._hints import hint

                    advice = hint(error)
                    if advice and advice not in str(error):  # not twice, on the way out of nested imports
                        raise ImportError(advice) from error
                    raise
                else:
                    object.__setattr__(self, "__class__", ModuleType)
                finally:
                    del self.__dict__["_genkit_running"]
        if name in self.__dict__:
            return self.__dict__[name]
        if "__getattr__" in self.__dict__:  # the module's own (PEP 562)
            return self.__dict__["__getattr__"](name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _loader(module: ModuleType) -> Loader:
    assert module.__spec__ is not None and module.__spec__.loader is not None  # _register saw to it
    return module.__spec__.loader


def _register(fullname: str) -> ModuleType | None:
    if fullname in sys.modules:
        return sys.modules[fullname]
    spec = importlib.util.find_spec(fullname)
    if spec is None or spec.loader is None:
        return None
    module = _LazyModule(fullname)
    module.__spec__ = spec
    module.__loader__ = spec.loader
    module.__file__ = spec.origin
    vars(module)["__cached__"] = spec.cached
    module.__package__ = spec.parent
    if spec.submodule_search_locations is not None:
        module.__path__ = spec.submodule_search_locations
    sys.modules[fullname] = module
    parent, _, child = fullname.rpartition(".")
    sys.modules[parent].__dict__[child] = module
    return module


def register_tree(fullname: str) -> None:
    """Register ``fullname`` and everything below it, executing nothing."""
    module = _register(fullname)
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if info.name.startswith("__"):
            continue
        child = f"{fullname}.{info.name}"
        if info.ispkg:
            register_tree(child)
        else:
            _register(child)
