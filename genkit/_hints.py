"""What to do about an import that failed for a reason outside genkit."""

from importlib import metadata


def hint(error: BaseException) -> str | None:
    """Advice about ``error``, raised while a module was imported; ``None`` where there is none to give.

    A torchvision built for another torch breaks the import of most of transformers and Diffusers, under names that have
    nothing to do with it ("Could not import module 'PreTrainedModel'").
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if not any("torchvision" in str(link) or "Could not import module" in str(link) for link in chain):
        return None
    try:
        versions = f"torchvision {metadata.version('torchvision')} does not work with torch {metadata.version('torch')}"
        import torchvision  # noqa: F401
    except metadata.PackageNotFoundError:
        return None
    except Exception as reason:
        return (
            f"{versions} ({reason}), and that breaks the import of transformers and diffusers. genkit does not need "
            "it: pip uninstall torchvision, or install the one that belongs to this torch with "
            "pip install --upgrade torch torchvision"
        )
    return None
