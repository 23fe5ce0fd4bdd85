"""What ``use`` changed is as before afterwards, and nobody else sees a change."""

import copy

import pytest
import torch

from genkit.attention import probing, use
from genkit.attention.rerouting import rerouted_to
from tests.attention._networks import build, settings


def test_it_is_a_setter(tiny_pipeline, ours):
    net = build("dit", tiny_pipeline)
    before = settings(net.module)
    chosen = use(net.module, "genkit")
    ours.clear()
    net.call(net.x)
    assert len(ours) == 2
    chosen.restore()
    assert settings(net.module) == before
    chosen.restore()
    assert settings(net.module) == before


@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_uses_within_uses(tiny_pipeline, ours, name):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    with use(net.module, "genkit"):
        between = settings(net.module)
        with use(net.module, "native"):
            ours.clear()
            net.call(net.x)
            assert not ours
        assert settings(net.module) == between
        net.call(net.x)
        assert ours
    assert settings(net.module) == before


@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_everything_is_restored_after_an_error(tiny_pipeline, name):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    with pytest.raises(KeyError, match="mine"), use(net.module, "genkit"):
        raise KeyError("mine")
    assert settings(net.module) == before


def test_what_was_done_is_undone_where_a_later_network_fails(tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline("flux")
    before = settings(pipe.text_encoder), settings(pipe.transformer)
    real = probing._problem
    monkeypatch.setattr(
        probing, "_problem", lambda *args: "it is too wide" if args[4] == 16 and args[7] is False else real(*args)
    )
    with pytest.raises(
        ValueError, match=r"'genkit'.*(vae|transformer), on cpu in torch.float32 with 16 channels.*wide"
    ):
        use(pipe, "genkit")
    assert (settings(pipe.text_encoder), settings(pipe.transformer)) == before


def test_a_class_that_something_else_changed_is_not_lost(tiny_pipeline):
    # As torch.distributed.fsdp.fully_shard does.
    net = build("dit", tiny_pipeline)
    chosen = use(net.module, "genkit")
    attention = net.module.transformer_blocks[0].attn1
    ours = type(attention)
    attention.__class__ = type("Sharded", (ours,), {})
    for change in (chosen.restore, chosen.restore, lambda: use(net.module, "_native_math")):
        with pytest.raises(RuntimeError, match="undo that first"):
            change()
    attention.__class__ = ours
    chosen.restore()
    assert rerouted_to(attention) is None


def test_copies_compute_with_their_own_weights(tiny_pipeline, ours):
    net = build("dit", tiny_pipeline)
    with torch.no_grad(), use(net.module, "genkit"):
        twin = copy.deepcopy(net.module)
        for p in twin.parameters():
            p.mul_(1.5)
        ours.clear()
        given = dict(timestep=torch.tensor([3, 500]), class_labels=torch.tensor([1, 2]))
        moved = twin(net.x, **given).sample
        assert len(ours) == 2 and (moved - net.call(net.x)).abs().max() > 1e-3
        assert list(twin.state_dict()) == list(net.module.state_dict())


def test_the_process_keeps_its_own_backend(tiny_pipeline, ours):
    one, other = build("flux", tiny_pipeline), build("flux", tiny_pipeline)
    with use(one.module, "genkit"):
        ours.clear()
        other.call(other.x)
        assert not ours
