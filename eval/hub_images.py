"""Data sets of the ``datasets`` library as sets of images."""

import torch
from pydantic import ValidationError

from genkit.data.hub_dataset import HubDataset, HubDatasetConfig
from genkit.eval.inputs import ImageSet, to_uint8, uint8_kind
from genkit.eval.preparation import Crop
from genkit.pipelines.by_name import parse_settings


def read_dataset(text: str, *, size: int | None = None, crop: Crop | None = None) -> ImageSet:
    """``hf:NAME,split=test`` or ``datasets:path=FOLDER,split=test``: settings of ``HubDatasetConfig``.

    Images are cut out of the centre by ADM's rule unless ``resize`` says otherwise. Nothing is downloaded unless the
    name is one of the Hub.

    Raises:
        ValueError: an unknown setting, no ``size`` here or there, ``crop="squash"``, and what ``HubDataset`` refuses.
        ImportError: the ``datasets`` library is not installed.
    """
    word, _, rest = text.partition(":")
    path, _, more = rest.partition(",") if word == "hf" else ("", "", rest)
    if word == "hf" and not path:
        raise ValueError(f"{text!r}: a name of the Hub goes after 'hf:'")
    settings = parse_settings(f"{word}:", more, HubDatasetConfig.model_fields)
    if path and settings.setdefault("path", path) != path:
        raise ValueError(f"{text!r} names path={settings['path']!r} too")
    if crop == "squash":
        raise ValueError("crop='squash': data sets are cut out of the centre; accepted is 'center'")
    if size is not None and settings.setdefault("size", size) != size:
        raise ValueError(f"size={size} and in {text!r} size={settings['size']}: give one")
    try:
        data = HubDataset(**{"resize": "adm", **settings})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{text!r}: {wrong}") from None
    config, columns = data.config, data.data
    labels = names = prompts = None
    if config.label_column is not None:
        labels = torch.tensor(columns[config.label_column][:], dtype=torch.int64)
        known = getattr(columns.features[config.label_column], "names", None)
        names = None if known is None else dict(enumerate(known))
    if config.caption_column is not None:
        prompts = [str(text) for text in columns[config.caption_column][:]]
    kind = f"{uint8_kind(config.shape)}, centre crop ({config.resize})"
    name = f"{config.path}/{config.split}"
    return ImageSet(
        name, len(data), lambda i: to_uint8(data.__getitems__(i)["x0"]), labels, prompts, kind, class_names=names
    )
