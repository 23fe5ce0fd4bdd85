"""A new word of a pipeline's text encoders, or the meaning of a class label: vectors, and nothing else changes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit._embedding_tables import Row, Table, Vocabulary, check_table, swap, table_of
from genkit.denoisers.base import Denoiser
from genkit.denoisers.network import unwrap

WORD_FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors", "learned_embeds_3.safetensors")
CLASS_FILE = "learned_class.safetensors"  # by the names of the tables, of which a network has any number
FILES = (*WORD_FILES, CLASS_FILE)
ABOUT = "textual_inversion.json"  # which token, of which tables


class Embedding(nn.Module):
    """Vectors that stand in the place of one row each of some embedding tables.

    ``values`` are the rows, ``(d_k,)``; as one vector ``(d,)`` they are ``flat``. Tables look up what ``at`` says
    within it, and ``values`` otherwise; the rest of them is as it was, and so is the network.
    """

    def __init__(self, token: str, rows: Sequence[Row]):
        super().__init__()
        self.token, self.rows = token, list(rows)
        self.values = nn.ParameterList([row.value.clone() for row in rows])
        for row, value in zip(self.rows, self.values, strict=True):
            row.value = value

    @property
    def flat(self) -> Tensor:
        return torch.cat(list(self.values))

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
        """Write a word as ``{token: (1, d)}``, a file a table, as Diffusers' ``load_textual_inversion`` reads them; a
        class as ``{name of the table: (1, d)}`` in one file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = [row.name for row in self.rows]
        vectors = [value.detach().float().cpu()[None].contiguous() for value in self.values]
        kind = "class" if self.rows[0].vocabulary is None else "word"
        if kind == "class":
            save_file(dict(zip(tables, vectors, strict=True)), folder / CLASS_FILE)
        else:
            for name, vector in zip(WORD_FILES, vectors, strict=False):
                save_file({self.token: vector}, folder / name)
        about = {"kind": kind, "token": self.token, "tables": tables}
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def insert(pipe: Any, student: Denoiser, *, token: str, initializer: str | None = None) -> Embedding:
    """Make ``token`` known to the pipeline, with vectors that start as those of ``initializer``.

    With text encoders ``token`` is a new word, and ``initializer`` one that each of them has as a single token. Without
    any, ``token`` is the number of a class, whose own vector is the start, in each table that the network has of them.
    A pipeline that is saved has it like any other. :func:`remove` takes it away.

    Raises:
        ValueError: a token that exists already, an initializer that is no single token, a label out of range, a
            pipeline that has neither text encoders nor classes, tables that are no ``nn.Embedding``.
    """
    encoders = text_encoders(pipe)
    if not encoders:
        return _insert_label(student, token, initializer)
    if initializer is None:
        raise ValueError("initializer=None: name a word that each of the text encoders has as a single token, as 'toy'")
    found = []
    for name, (tokenizer, encoder) in encoders.items():
        known = tokenizer.get_vocab()
        if token in known:
            raise ValueError(
                f"token={token!r} exists already in {name}'s tokenizer; choose another, such as '<{token}-2>'"
            )
        ids = tokenizer(initializer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"initializer={initializer!r} is {len(ids)} tokens of {name}; choose a word that is one")
        check_table(name, encoder.get_input_embeddings())
        found.append((name, tokenizer, encoder, ids[0]))
    rows = []
    for name, tokenizer, encoder, start in found:  # all is known to be right before anything changes
        vocabulary = Vocabulary(tokenizer, encoder)
        table = table_of(encoder, encoder.get_input_embeddings())
        encoder.set_input_embeddings(table)  # also where the encoder has it a second time, as T5
        rows.append(Row(name, table, vocabulary.add(token), start, vocabulary))
    return Embedding(token, rows)


def remove(pipe: Any, embedding: Embedding) -> None:
    """Undo :func:`insert`: tables and tokenizers of the pipeline are what they were.

    Raises:
        ValueError: it is not in the pipeline, or not what was added last to a tokenizer.
    """
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    there = {module for part in parts for module in part.modules()}
    for row in embedding.rows:
        if row not in row.table.rows or row.table not in there:
            raise ValueError(f"token={embedding.token!r} is not in the {row.name} of this pipeline")
        words = row.vocabulary
        if words is not None and (row.table.rows[-1] is not row or len(words.tokenizer) != words.length):
            raise ValueError(
                f"token={embedding.token!r} is not the last word of {row.name}'s tokenizer; remove later ones first"
            )
    for row in embedding.rows:
        row.table.rows.remove(row)
        if row.vocabulary is not None:
            row.vocabulary.undo()
        if not row.table.rows:
            ordinary = row.table.__dict__["ordinary"]
            ordinary.weight = row.table.weight
            for part in parts:
                swap(part, row.table, ordinary)


def text_encoders(pipe: Any) -> dict[str, tuple[Any, Any]]:
    """``(tokenizer, text encoder)`` by the encoder's name, of those that the pipeline has."""
    found = {}
    for suffix in ("", "_2", "_3"):
        encoder, tokenizer = (pipe.components.get(f"{kind}{suffix}") for kind in ("text_encoder", "tokenizer"))
        if encoder is not None and tokenizer is not None:
            found[f"text_encoder{suffix}"] = (tokenizer, encoder)
    return found


def _insert_label(student: Denoiser, token: str, initializer: str | None) -> Embedding:
    network = unwrap(student.module)
    tables = _label_tables(network)
    if initializer is not None:
        raise ValueError(f"initializer={initializer!r}: a class starts from its own vector; leave it out")
    label = _label(token, tables)
    made = {name: table_of(network, table) for name, table in tables.items()}
    if any(row.index == label for table in made.values() for row in table.rows):
        raise ValueError(f"token={token!r}: that class is learned already; remove its embedding first")
    return Embedding(token, [Row(name, table, label, label) for name, table in made.items()])


def _label_tables(network: nn.Module) -> dict[str, nn.Embedding]:
    """All by their names: some networks embed the class anew in every block."""
    keys = ("class_embed", "embedding_table", "class_embedding")
    tables = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in keys
    }
    if not tables:
        raise ValueError(f"{type(network).__name__} has neither text encoders nor an embedding of classes")
    for name, table in tables.items():
        check_table(name, table)
    return tables


def _label(token: str, tables: dict[str, nn.Embedding]) -> int:
    classes = min(table.num_embeddings for table in tables.values()) - 1  # the last row is of no class
    if not token.isdecimal() or int(token) >= classes:
        raise ValueError(f"token={token!r}: the network has classes; accepted are 0 to {classes - 1}")
    return int(token)


def load(pipe: Any, folder: str | Path) -> str:
    """Give a pipeline the token in ``folder``, which :class:`Embedding` wrote; returns the token.

    A word goes through Diffusers' own ``load_textual_inversion``; a class gets its new vectors.

    Raises:
        ValueError: no such files, or others; a token that exists already; a label out of range; files for other
            encoders or tables than the pipeline has.
    """
    folder = Path(folder)
    kind, token, vectors = _read(folder)
    load_kind = _load_class if kind == "class" else _load_word
    load_kind(pipe, folder, token, vectors)
    return token


def _read(folder: Path) -> tuple[str, str, dict[str, Tensor]]:
    """``word`` or ``class``, the token, and its vectors by the names of their tables."""
    about_file = folder / ABOUT
    if not about_file.is_file():
        raise ValueError(f"{folder} holds no {ABOUT}; expected what a run of textual inversion wrote")
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        kind, token, tables = str(about["kind"]), str(about["token"]), list(about["tables"])
        if kind == "class":
            found = load_file(folder / CLASS_FILE)
            vectors = {name: found[name] for name in tables}
        else:
            files = dict(zip(tables, WORD_FILES, strict=False))
            vectors = {name: load_file(folder / file)[token] for name, file in files.items()}
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not what a run of textual inversion wrote: {error!r}") from error
    for name, vector in vectors.items():
        if vector.ndim != 2 or len(vector) != 1:
            raise ValueError(f"{folder} has {tuple(vector.shape)} for {name}; accepted is one vector, (1, d)")
    return kind, token, {name: vector[0] for name, vector in vectors.items()}


def _load_class(pipe: Any, folder: Path, token: str, vectors: dict[str, Tensor]) -> None:
    network = next((pipe.components[k] for k in ("transformer", "unet") if k in pipe.components), None)
    if network is None:
        raise ValueError(f"{folder} holds a class; the pipeline has neither a transformer nor a unet")
    tables = _label_tables(unwrap(network))
    if list(tables) != list(vectors):
        raise ValueError(f"{folder} is for {list(vectors)}, the network has {list(tables)}")
    label = _label(token, tables)
    for name, table in tables.items():
        if len(vectors[name]) != table.embedding_dim:
            raise ValueError(
                f"{folder} has a vector of {len(vectors[name])} for {name}, the network's classes have "
                f"{table.embedding_dim}"
            )
        if isinstance(table, Table) and any(row.index == label for row in table.rows):
            raise ValueError(f"token={token!r}: that class is being learned; load it into a fresh pipeline")
    with torch.no_grad():
        for name, table in tables.items():
            table.weight[label] = vectors[name].to(table.weight)


def _load_word(pipe: Any, folder: Path, token: str, vectors: dict[str, Tensor]) -> None:
    encoders = text_encoders(pipe)
    if list(encoders) != list(vectors):
        raise ValueError(f"{folder} is for {list(vectors)}, the pipeline has {list(encoders)}")
    for name, (tokenizer, encoder) in encoders.items():
        width = encoder.get_input_embeddings().weight.shape[1]
        if token in tokenizer.get_vocab():
            raise ValueError(f"token={token!r} exists already in {name}'s tokenizer; load it into a fresh pipeline")
        if len(vectors[name]) != width:
            raise ValueError(f"{folder} has a vector of {len(vectors[name])} for {name}, whose tokens have {width}")
    for name, (tokenizer, encoder) in encoders.items():
        if hasattr(pipe, "load_textual_inversion"):
            pipe.load_textual_inversion(vectors[name], token=token, text_encoder=encoder, tokenizer=tokenizer)
        else:
            _extend(tokenizer, encoder, token, vectors[name])


def _extend(tokenizer: Any, encoder: Any, token: str, vector: Tensor) -> None:
    """For pipelines that have no such method, as SD3's."""
    tokenizer.add_tokens(token)
    at = tokenizer.convert_tokens_to_ids(token)
    encoder.resize_token_embeddings(max(at + 1, len(encoder.get_input_embeddings().weight)), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[at] = vector.to(encoder.get_input_embeddings().weight)
