"""Choices of backends on top of each other: undone in the reverse order, or not at all."""

import pytest
from torch import nn

from genkit.attention import use
from tests.attention._networks import build, settings


@pytest.mark.parametrize("pair", [("_native_math", "genkit"), ("genkit", "genkit")], ids="-".join)
@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_undone_in_the_wrong_order_nothing_changes(tiny_pipeline, name, pair):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    first, second = (use(net.module, backend) for backend in pair)
    between = settings(net.module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"'{pair[0]}' cannot be undone before '{pair[1]}'.*undo that first"):
            first.restore()
        assert settings(net.module) == between
    second.restore()
    first.restore()
    assert settings(net.module) == before


def test_a_part_chosen_later_is_undone_first(tiny_pipeline):
    pipe = tiny_pipeline("flux")
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    before = [settings(part) for part in parts]
    whole = use(pipe, "genkit")
    part = use(pipe.transformer.transformer_blocks[0], "_native_math")
    with pytest.raises(RuntimeError, match="'genkit' cannot be undone before '_native_math'"):
        whole.restore()
    part.restore()
    whole.restore()
    assert [settings(part) for part in parts] == before


@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_a_choice_that_nobody_holds_goes_with_the_one_below(tiny_pipeline, name):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    with use(net.module, "genkit"):
        use(net.module, "_native_math")
    assert settings(net.module) == before


def test_other_networks_are_undone_in_any_order(tiny_pipeline):
    nets = [build(name, tiny_pipeline).module for name in ("flux", "dit")]
    before = [settings(net) for net in nets]
    chosen = [use(net, "genkit") for net in nets]
    for one in chosen:
        one.restore()
    assert [settings(net) for net in nets] == before
