"""Embedding tables and vocabularies to which rows and words are added, and from which they are taken again."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Table(nn.Embedding):
    """An embedding table some rows of which are looked up elsewhere; they may lie beyond its end.

    Its state dict is that of an ordinary table with these rows in it, so that whoever saves the network saves them.
    """

    rows: list["Row"]

    def __init__(self, table: nn.Embedding):
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.weight = table.weight
        self.__dict__["ordinary"] = table  # of the same weight, so no part of this module
        self.rows = []

    def forward(self, ids: Tensor) -> Tensor:
        own = ids
        for row in self.rows:  # which may be beyond the end
            own = own.masked_fill(ids == row.index, 0)
        found = F.embedding(own, self.weight)
        for row in self.rows:
            found = torch.where((ids == row.index)[..., None], row.value.to(found), found)
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight.detach()
        whole = weight.new_zeros(max([len(weight), *(row.index + 1 for row in self.rows)]), weight.shape[1])
        whole[: len(weight)] = weight
        for row in self.rows:
            whole[row.index] = row.value.detach().to(whole)
        destination[prefix + "weight"] = whole


class Vocabulary:
    """What a text encoder knew before a word was added."""

    def __init__(self, tokenizer: Any, encoder: Any):
        self.tokenizer, self.config = tokenizer, encoder.config.get_text_config()
        self.known, self.size = copy.deepcopy(tokenizer).__dict__, self.config.vocab_size

    def add(self, token: str) -> int:
        """The number of ``token``, which is known from now on."""
        self.tokenizer.add_tokens(token)
        index = self.tokenizer.convert_tokens_to_ids(token)
        self.config.vocab_size = max(self.size, index + 1)  # what is saved is read by that
        self.length = len(self.tokenizer)
        return index

    def undo(self) -> None:
        # In place, since pipelines share tokenizers; no tokenizer can take a word out of itself.
        self.tokenizer.__dict__ = self.known
        self.config.vocab_size = self.size


class Row:
    """Row ``index`` of ``table``, which starts as row ``start`` of it."""

    def __init__(self, name: str, table: Table, index: int, start: int, vocabulary: Vocabulary | None = None):
        self.name, self.table, self.index, self.vocabulary = name, table, index, vocabulary
        with torch.no_grad():
            self.value = table(torch.tensor(start, device=table.weight.device)).float().clone()
        table.rows.append(self)


def check_table(name: str, table: nn.Module) -> None:
    """Raises ValueError where ``table`` is more than a plain embedding, whose look-up could not be split."""
    if type(table) not in (nn.Embedding, Table):
        raise ValueError(f"the table of {name} is a {type(table).__name__}; accepted is an nn.Embedding")


def table_of(network: nn.Module, table: nn.Module) -> Table:
    """``table`` of ``network`` as one whose rows can be looked up elsewhere, in its place."""
    if isinstance(table, Table):
        return table
    assert isinstance(table, nn.Embedding)
    made = Table(table)
    swap(network, table, made)
    return made


def swap(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of ``network`` where ``old`` is."""
    for module in list(network.modules()):
        for key, child in module._modules.items():
            if child is old:
                setattr(module, key, new)
