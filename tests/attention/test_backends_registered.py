"""Backends that a user registers."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from genkit import attention
from genkit.attention import conventions, probing, register_backend, use
from tests.attention._networks import build

CALLS = []


def plain_flash(query, key, value, attn_mask=None, is_causal=False, scale=None):
    """In the convention of Diffusers, without grouped heads, dropout."""
    CALLS.append((query.shape, attn_mask, is_causal))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale).transpose(1, 2)


def bare(query, key, value):
    return plain_flash(query, key, value)


def everything(query, key, value, **given):
    CALLS.append(given)
    return plain_flash(query, key, value)


@pytest.fixture(autouse=True)
def registered():
    for function in (plain_flash, bare, everything):
        register_backend(f"mine_{function.__name__}", function)
    CALLS.clear()


@pytest.mark.parametrize("name", ["flux", "dit", "unet", "clip_text", "llama"])
def test_it_reaches_every_kind_of_network(tiny_pipeline, name):
    net = build(name, tiny_pipeline)
    with torch.no_grad():
        expected = net.call(net.x)
        with use(net.module, "mine_plain_flash") as chosen:
            CALLS.clear()
            torch.testing.assert_close(net.call(net.x), expected, rtol=1e-5, atol=1e-6)
            assert len(CALLS) == net.calls and chosen.backend == {"": "mine_plain_flash"}
        CALLS.clear()
        assert torch.equal(net.call(net.x), expected) and not CALLS


def test_it_is_listed_and_registered_once():
    register_backend("mine_plain_flash", plain_flash)
    assert probing.names().count("mine_plain_flash") == 1
    with pytest.raises(ValueError, match="backend='mine_plane_flash' is not known.*did you mean 'mine_plain_flash'"):
        use(torch.nn.Linear(1, 1), "mine_plane_flash")
    assert attention.register_backend is register_backend and "register_backend" in attention.__all__


@pytest.mark.parametrize("name", ["mine_plain_flash", "flash", "_native_math", "native", "genkit", "auto"])
def test_names_that_are_taken(name):
    with pytest.raises(ValueError, match=f"name='{name}' is an attention backend already; choose another name"):
        register_backend(name, lambda query, key, value: query)


@pytest.mark.parametrize("name", ["Mine", "my backend", "", "8bit", None])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="is no name of a backend; expected letters in lower case"):
        register_backend(name, bare)


def test_what_cannot_be_called():
    with pytest.raises(ValueError, match="function=3 cannot be called"):
        register_backend("mine_three", 3)


def test_what_it_lacks_is_refused_not_dropped(tiny_pipeline):
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    x = torch.randn(2, 5, 4, 8)
    with attention_backend("mine_bare"):
        assert dispatch_attention_fn(x, x, x).shape == x.shape
        for argument, value in (("attn_mask", torch.ones(2, 5) > 0), ("is_causal", True), ("scale", 0.1)):
            with pytest.raises(ValueError, match=f"'mine_bare' has no {argument}; choose"):
                dispatch_attention_fn(x, x, x, **{argument: value})
    llama = build("llama", tiny_pipeline)
    with use(llama.module, "mine_bare"), pytest.raises(ValueError, match="'mine_bare' has no attn_mask"):
        llama.call(llama.x)
    llama.module.config.attention_dropout = 0.1
    for layer in llama.module.train().layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="'mine_plain_flash' does not compute .*dropout=0.1"):
        use(llama.module, "mine_plain_flash")


def test_arguments_arrive_in_diffusers_convention():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    attend = conventions.of_user("mine_plain_flash", plain_flash)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)), enable_gqa=True)
    torch.testing.assert_close(attend(q, k, k, enable_gqa=True), expected.transpose(1, 2))
    attend(q, q, q, attn_mask=torch.ones(2, 5, dtype=torch.bool))
    assert CALLS[-1][1].shape == (2, 1, 1, 5)
    conventions.of_user("mine_everything", everything)(q, q, q, scale=0.5, enable_gqa=True)
    assert CALLS[-2] == dict(attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.5, enable_gqa=True)
    for given in (dict(return_lse=True), dict(_parallel_config=object()), dict(is_causal=True)):
        with pytest.raises(ValueError, match="mine_plain_flash|is_causal=True with 3 queries"):
            attend(q[:, :3], q, q, **given)


def test_names_with_flash_get_masks_of_the_usual_form(tiny_pipeline):
    # Transformers gives other masks wherever a name has "flash" in it.
    use(build("llama", tiny_pipeline).module, "mine_plain_flash").restore()
    found = [name for name in AttentionInterface().valid_keys() if "mine_plain" in name]
    assert len(found) == 1 and "flash" not in found[0]


def test_one_that_is_wrong_is_refused(tiny_pipeline):
    register_backend("mine_wrong", _wrong)
    with pytest.raises(ValueError, match="'mine_wrong' does not compute.*its result is wrong"):
        use(build("dit", tiny_pipeline).module, "mine_wrong")


def _wrong(query, key, value):
    return query
