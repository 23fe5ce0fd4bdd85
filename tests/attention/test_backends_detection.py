"""Attention that a module computes by itself is found however the code names it; where none is, that is said."""

import logging
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genkit.attention import attention_coverage, backends, use
from tests.attention import _attention_elsewhere, _networks
from tests.attention._attention_elsewhere import attend as imported

sdpa = F.scaled_dot_product_attention


class _Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))


class Alias(_Weighted):
    def forward(self, x):
        return sdpa(self.w * x, x, x)


class Kept(_Weighted):
    def __init__(self, function=sdpa):
        super().__init__()
        self.attend = function

    def forward(self, x):
        return self.attend(self.w * x, x, x)


class OfClass(_Weighted):
    attend = staticmethod(sdpa)

    def forward(self, x):
        return self.attend(self.w * x, x, x)


class OwnMethod(_Weighted):
    def scaled_dot_product_attention(self, q, k, v):
        return sdpa(q, k, v)

    def forward(self, x):
        return self.scaled_dot_product_attention(self.w * x, x, x)


class Imported(_Weighted):
    def forward(self, x):
        return imported(self.w * x, x, x)


class OfAModule(_Weighted):
    def forward(self, x):
        return _attention_elsewhere.attend(self.w * x, x, x)


class Super(Alias):
    def forward(self, x):
        return super().forward(x) + 0


class SuperOfSuper(Super):
    def forward(self, x):
        return super().forward(x) + 0


def _closed(function):
    class Closure(_Weighted):
        def forward(self, x):
            return function(self.w * x, x, x)

    return Closure()


FOUND = {
    "alias": Alias,
    "kept": Kept,
    "kept_partial": lambda: Kept(partial(sdpa, is_causal=False)),
    "kept_function": lambda: Kept(imported),
    "of_class": OfClass,
    "own_method": OwnMethod,
    "imported": Imported,
    "of_a_module": OfAModule,
    "super": Super,
    "super_of_super": SuperOfSuper,
    "closure": lambda: _closed(imported),
}


@pytest.mark.parametrize("name", FOUND)
def test_it_is_found_and_reached(ours, name):
    m, x = FOUND[name](), torch.randn(1, 2, 5, 8)
    expected = m(x)
    with use(m, "genkit", tangent=True) as chosen:
        ours.clear()
        torch.testing.assert_close(m(x), expected, rtol=1e-5, atol=1e-6)
        assert len(ours) == 1 and [record.way for record in chosen.coverage] == ["rerouted"]


class ByHand(_Weighted):
    """Its own method is no attention of PyTorch's, whatever its name."""

    def scaled_dot_product_attention(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    def forward(self, x):
        return self.scaled_dot_product_attention(self.w * x, x, x)


class HiddenAttention(Alias):
    pass


class Object:
    def __call__(self, q, k, v):
        return sdpa(q, k, v)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(2, 2), "reaches nothing in Linear: no attention was found in it"),
        (ByHand, "reaches nothing in ByHand"),
        (lambda: Kept(Object()), "reaches nothing in Kept"),
        (lambda: torch.jit.script(HiddenAttention()), "does not reach, in .*TorchScript computes it"),
        (lambda: nn.Sequential(torch.jit.script(HiddenAttention())), r"does not reach, in Sequential: 0 .*TorchScript"),
        (lambda: nn.MultiheadAttention(4, 1), "does not reach, in MultiheadAttention.*within one function"),
    ],
    ids=["linear", "by_hand", "object", "scripted", "scripted_part", "torch"],
)
def test_where_none_is_reached_that_is_said(said, make, says):
    m = make()
    backends._say.cache_clear()
    use(m, "genkit").restore()
    warned = [r.getMessage() for r in said.records if r.levelno == logging.WARNING and r.name == "genkit.attention"]
    assert len(warned) == 1 and re.search(says, warned[0])
    with pytest.raises(ValueError, match="tangent=True, and no attention of .* was reached .*if it has some, write it"):
        use(m, "genkit", tangent=True)


def test_a_pipeline_with_a_network_that_has_none(tiny_pipeline, said):
    both = nn.ModuleDict({"dit": _networks.build("dit", tiny_pipeline).module, "linear": nn.Linear(1, 1)})
    use(both, "genkit", tangent=True).restore()
    assert not [r for r in said.records if r.levelno == logging.WARNING and r.name == "genkit.attention"]


def test_what_an_instance_keeps_is_its_own():
    assert attention_coverage(Kept()) and not attention_coverage(Kept(torch.add)) and attention_coverage(Kept())
