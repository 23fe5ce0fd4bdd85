"""Data sources behind one interface: a file a source, found by its file's name."""

from genkit.data.base import Source, collate
from genkit.data.loader import batches
from genkit.registry import lookup, members

__all__ = ["Source", "batches", "collate", "make", "names"]


def names() -> list[str]:
    """Names of the sources."""
    return sorted(members("genkit.data", Source))


def make(name: str, **settings) -> Source:
    """The source called ``name`` with its ``settings``.

    Raises:
        ValueError: an unknown name; a setting that the source's ``Config`` refuses.
    """
    return lookup("genkit.data", Source, name, setting="source")(**settings)
