"""A new word of a pipeline's text encoders, or the meaning of a class label: vectors, and nothing else changes."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.denoisers.base import Denoiser

logger = logging.getLogger("genkit")

FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors", "learned_embeds_3.safetensors")
ABOUT = "textual_inversion.json"  # which token, of which tables


class Embedding(nn.Module):
    """Vectors that stand in the place of one row each of some embedding tables.

    ``values`` are the rows, ``(d_k,)``; as one vector ``(d,)`` they are ``flat``. Tables look up what ``at`` says
    within it, and ``values`` otherwise; the rest of them is as it was, and so is the network.
    """

    def __init__(self, token: str, rows: Sequence["Row"]):
        super().__init__()
        self.token, self.rows = token, list(rows)
        self.values = nn.ParameterList([row.start.clone() for row in rows])
        for row, value in zip(self.rows, self.values, strict=True):
            row.value = value

    @property
    def flat(self) -> Tensor:
        return torch.cat([v for v in self.values])

    @contextmanager
    def at(self, flat: Tensor) -> Iterator[None]:
        """Within, tables have the rows of ``flat`` ``(d,)``."""
        before = [row.value for row in self.rows]
        for row, value in zip(self.rows, flat.split([len(v) for v in self.values]), strict=True):
            row.value = value
        try:
            yield
        finally:
            for row, value in zip(self.rows, before, strict=True):
                row.value = value

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write ``{token: (1, d)}``, a file a table, as Diffusers' ``load_textual_inversion`` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(FILES, self.values, strict=False):
            save_file({self.token: value.detach().float().cpu()[None].contiguous()}, folder / name)
        about = {"token": self.token, "tables": [row.name for row in self.rows]}
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


class Row(nn.Module):
    """An embedding table of which one row is looked up elsewhere; ``index`` may lie beyond its end."""

    value: Tensor

    def __init__(self, name: str, table: nn.Embedding, index: int, start: Tensor):
        super().__init__()
        self.name, self.table, self.index = name, table, index
        self.start = start.detach().float().clone()
        self.__dict__["value"] = self.start  # not a parameter of the encoder that this stands in

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "value":
            self.__dict__[key] = value
        else:
            super().__setattr__(key, value)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.table.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        chosen = ids == self.index
        found = F.embedding(ids.masked_fill(chosen, 0), self.table.weight)
        return torch.where(chosen[..., None], self.value.to(found), found)


def insert(pipe: Any, student: Denoiser, *, token: str, initializer: str | None = None) -> Embedding:
    """Make ``token`` known to the pipeline, with vectors that start as those of ``initializer``.

    With text encoders ``token`` is a new word, and ``initializer`` one that each of them has as a single token. Without
    any, ``token`` is the number of a class, whose own vector is the start.

    Raises:
        ValueError: a token that exists already, an initializer that is no single token, a label out of range, a
            pipeline that has neither text encoders nor classes.
    """
    encoders = text_encoders(pipe)
    if not encoders:
        return _insert_label(student, token, initializer)
    if initializer is None:
        raise ValueError("initializer=None: name a word that each of the text encoders has as a single token, as 'toy'")
    rows = []
    for name, (tokenizer, encoder) in encoders.items():
        known = tokenizer.get_vocab()
        if token in known:
            raise ValueError(
                f"token={token!r} exists already in {name}'s tokenizer; choose another, such as '<{token}-2>'"
            )
        ids = tokenizer(initializer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"initializer={initializer!r} is {len(ids)} tokens of {name}; choose a word that is one")
        table = encoder.get_input_embeddings()
        rows.append((name, tokenizer, encoder, table, table.weight[ids[0]]))
    made = []
    for name, tokenizer, encoder, table, start in rows:  # all is known to be right before anything changes
        tokenizer.add_tokens(token)
        made.append(Row(name, table, tokenizer.convert_tokens_to_ids(token), start))
        encoder.set_input_embeddings(made[-1])
    return Embedding(token, made)


def text_encoders(pipe: Any) -> dict[str, tuple[Any, Any]]:
    """``(tokenizer, text encoder)`` by the encoder's name, of those that the pipeline has."""
    found = {}
    for suffix in ("", "_2", "_3"):
        encoder, tokenizer = (pipe.components.get(f"{kind}{suffix}") for kind in ("text_encoder", "tokenizer"))
        if encoder is not None and tokenizer is not None:
            found[f"text_encoder{suffix}"] = (tokenizer, encoder)
    return found


def _insert_label(student: Denoiser, token: str, initializer: str | None) -> Embedding:
    parent, key, table = _label_table(student.module)
    classes = table.num_embeddings - 1  # the last row is of no class
    if initializer is not None:
        raise ValueError(f"initializer={initializer!r}: a class starts from its own vector; leave it out")
    if not token.isdecimal() or int(token) >= classes:
        raise ValueError(f"token={token!r}: the network has classes; accepted are 0 to {classes - 1}")
    row = Row("class_embed", table, int(token), table.weight[int(token)])
    setattr(parent, key, row)
    return Embedding(token, [row])


def _label_table(network: nn.Module) -> tuple[nn.Module, str, nn.Embedding]:
    for name, module in network.named_modules():
        key = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and key in ("class_embed", "embedding_table", "class_embedding"):
            return network.get_submodule(name.rpartition(".")[0]), key, module
    raise ValueError(f"{type(network).__name__} has neither text encoders nor an embedding of classes")


def load(pipe: Any, folder: str | Path) -> str:
    """Give a pipeline the token in ``folder``, which :class:`Embedding` wrote; returns the token.

    A word goes through Diffusers' own ``load_textual_inversion``; a class gets its new vector.

    Raises:
        ValueError: no such files; a token that exists already; files for other encoders than the pipeline has.
    """
    folder = Path(folder)
    about_file = folder / ABOUT
    if not about_file.is_file():
        raise ValueError(f"{folder} holds no {ABOUT}; expected what a run of textual inversion wrote")
    about = json.loads(about_file.read_text(encoding="utf-8"))
    token, encoders = about["token"], text_encoders(pipe)
    vectors = [load_file(folder / name)[token][0] for name, _ in zip(FILES, about["tables"], strict=False)]
    if about["tables"] == ["class_embed"]:
        network = next(v for k, v in pipe.components.items() if k in ("transformer", "unet"))
        _, _, table = _label_table(network)
        if len(vectors[0]) != table.embedding_dim:
            raise ValueError(
                f"{folder} has a vector of {len(vectors[0])}, the network's classes have {table.embedding_dim}"
            )
        with torch.no_grad():
            table.weight[int(token)] = vectors[0].to(table.weight)
        return token
    if list(encoders) != about["tables"]:
        raise ValueError(f"{folder} is for {about['tables']}, the pipeline has {list(encoders)}")
    for (name, (tokenizer, encoder)), vector in zip(encoders.items(), vectors, strict=True):
        width = encoder.get_input_embeddings().weight.shape[1]
        if token in tokenizer.get_vocab():
            raise ValueError(f"token={token!r} exists already in {name}'s tokenizer; load it into a fresh pipeline")
        if len(vector) != width:
            raise ValueError(f"{folder} has a vector of {len(vector)} for {name}, whose tokens have {width}")
    for (_, (tokenizer, encoder)), vector in zip(encoders.items(), vectors, strict=True):
        if hasattr(pipe, "load_textual_inversion"):
            pipe.load_textual_inversion(vector, token=token, text_encoder=encoder, tokenizer=tokenizer)
        else:
            _extend(tokenizer, encoder, token, vector)
    return token


def _extend(tokenizer: Any, encoder: Any, token: str, vector: Tensor) -> None:
    """For pipelines that have no such method, as SD3's."""
    tokenizer.add_tokens(token)
    at = tokenizer.convert_tokens_to_ids(token)
    encoder.resize_token_embeddings(max(at + 1, encoder.get_input_embeddings().num_embeddings))
    with torch.no_grad():
        encoder.get_input_embeddings().weight[at] = vector.to(encoder.get_input_embeddings().weight)
