"""HPSv2: OpenCLIP's weights in transformers' model, and files in the published form."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from genkit import rewards
from genkit.rewards._clip import image_features, text_features
from genkit.rewards._open_clip import clip_config, converted
from genkit.rewards._preprocessing import padded
from tests.rewards import published, tiny

TEXTS = ["a red cat", "two dogs on grass", "x" * 100]


@pytest.fixture(scope="module")
def net():
    return published.OpenCLIP(190)


def tokens_of_open_clip(tokenizer):
    """Padded with zeros; the last of 77 is the end in any case."""
    rows = torch.zeros(len(TEXTS), 77, dtype=torch.long)
    for row, text in zip(rows, TEXTS, strict=True):
        ids = torch.tensor(tokenizer(text).input_ids)[:77]
        row[: len(ids)] = ids
        if len(ids) == 77:
            row[-1] = tokenizer.eos_token_id
    return rows


def test_features_are_those_of_open_clip(net, reward):
    made, pixels = reward("hpsv2"), torch.randn(3, 3, 28, 28)
    seen, read = net.visual(pixels), net.read(tokens_of_open_clip(made.tokenizer))
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(image_features(made.model, pixels), unit(seen), rtol=0, atol=1e-6)
    torch.testing.assert_close(text_features(made.model, made.tokenizer, TEXTS), unit(read), rtol=0, atol=1e-6)
    assert (seen[0] - seen[1]).norm() > 0.1 * seen[0].norm()  # the images are told apart


def test_the_score_is_the_cosine_of_the_whole_image(net, reward):
    made, images = reward("hpsv2"), tiny.images(3, 3, 40, 64)
    expected = net(padded(images, 28), tokens_of_open_clip(made.tokenizer))
    torch.testing.assert_close(made(images, TEXTS), expected, rtol=0, atol=1e-6)
    edge = images.clone()
    edge[..., :3] = 0  # where the crop of CLIP would not look
    assert (made(edge, TEXTS) - made(images, TEXTS)).abs().min() > 1e-6


def test_every_weight_has_its_place(net):
    state = net.state_dict()
    config = clip_config(state, vision_head=80, text_head=64, end=7)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (2, 2)
    assert config.vision_config.hidden_act == config.text_config.hidden_act == "gelu"
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (28, 14)
    assert (config.projection_dim, config.text_config.eos_token_id) == (24, 7)
    count = sum(value.numel() for key, value in state.items() if key != "attn_mask")
    assert sum(value.numel() for value in converted(state).values()) == count


def test_the_two_versions_are_two_files(net, tmp_path, settings):
    tokenizer = settings["hpsv2"]["tokenizer"]
    torch.save({"state_dict": net.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
    old = rewards.make("hpsv2", model=str(tmp_path), tokenizer=tokenizer, version="v2.0")
    assert old.scale == (0.26, 0.29) and rewards.make("hpsv2", **settings["hpsv2"]).scale == (0.25, 0.41)
    with pytest.raises(ValueError, match="HPS_v2.1_compressed.pt"):
        rewards.make("hpsv2", model=str(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="version"):
        rewards.make("hpsv2", model=str(tmp_path), tokenizer=tokenizer, version="v3")


def test_half_precision_files_and_safetensors(net, tmp_path, settings, reward):
    state = {key: value.half() for key, value in net.state_dict().items() if key != "attn_mask"}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "hps.safetensors")
    made = rewards.make("hpsv2", **settings["hpsv2"] | {"model": str(tmp_path / "hps.safetensors")})
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    images = tiny.images(3, 3, 40, 64)
    torch.testing.assert_close(made(images, TEXTS), reward("hpsv2")(images, TEXTS), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.conv1.weight"), "without 'visual.conv1.weight'"),
        (lambda s: s.pop("ln_final.bias"), "final_layer_norm.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "more"),
        (lambda s: s.update({"ln_final.bias": torch.zeros(5)}), "do not fit a CLIPModel"),
    ],
    ids=["no images", "one missing", "one more", "another shape"],
)
def test_other_weights_are_refused(change, message, net, tmp_path, settings):
    state = dict(net.state_dict())
    change(state)
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=message):
        rewards.make("hpsv2", model=str(tmp_path), tokenizer=settings["hpsv2"]["tokenizer"])


def test_an_image_of_which_nothing_is_left_is_refused(reward):
    made = reward("hpsv2")
    made.check_size((3, 40, 64))
    with pytest.raises(ValueError, match="nothing is left"):
        made.check_size((3, 1, 640))


def test_the_end_of_the_text_is_the_tokenizers(reward, settings):
    end = AutoTokenizer.from_pretrained(settings["hpsv2"]["tokenizer"]).eos_token_id
    assert reward("hpsv2").model.text_model.eos_token_id == end
