"""ImageReward: BLIP's weights in transformers' models."""

import pytest
import torch
from safetensors.torch import save_file

from genkit import rewards
from genkit.rewards._preprocessing import Preprocessing
from tests.rewards import published, tiny

TEXTS = ["a red cat", "two dogs on grass", "x " * 60]


@pytest.fixture(scope="module")
def net():
    return published.ImageRewardNet(200)


def test_the_score_is_that_of_the_published_network(net, reward):
    made, images = reward("image_reward"), tiny.images(3, 3, 20, 31)
    tokens = made.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.attention_mask.sum(1).tolist() == [9, 16, 35]  # [CLS], a letter each, [SEP]; the last one is cut
    pixels = Preprocessing(16, (16, 16), half=round)(images)
    expected = net(pixels, tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(made(images, TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3


def test_padding_is_not_read(net, reward):
    made, images = reward("image_reward"), tiny.images(1, 3, 16, 16)
    before = made(images, ["cat"])
    with torch.no_grad():
        made.text_model.embeddings.word_embeddings.weight[made.tokenizer.pad_token_id] += 5
    torch.testing.assert_close(made(images, ["cat"]), before)


def test_what_is_left_out_of_the_file_is_not_needed(net):
    prefixes = {key.split(".")[0] + "." + key.split(".")[1] for key in net.state_dict()}
    assert prefixes == {"blip.visual_encoder", "blip.text_encoder", "blip.vision_proj", "mlp.layers"}


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("blip.visual_encoder.pos_embed", "has no 'pos_embed'"),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", "has no .*crossattention"),
        ("blip.visual_encoder.norm.weight", "post_layernorm"),
        ("blip.text_encoder.encoder.layer.1.output.dense.bias", "do not fit a BlipTextModel"),
        ("mlp.layers.4.bias", "a head of"),
    ],
)
def test_other_weights_are_refused(drop, message, net, tmp_path, settings):
    state = {key: value for key, value in net.state_dict().items() if key != drop}
    save_file(state, tmp_path / "reward.safetensors")
    with pytest.raises(ValueError, match=message):
        rewards.make("image_reward", model=str(tmp_path / "reward.safetensors"), **_tokenizer(settings))


def _tokenizer(settings):
    return {"tokenizer": settings["image_reward"]["tokenizer"]}
