"""Rewards as metrics."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from genkit import rewards
from genkit.eval.by_name import split
from genkit.eval.inputs import read_images
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.metrics.reward import RewardMetric
from genkit.eval.result import require_comparable
from genkit.eval.run import evaluate
from genkit.eval.statistics import FeatureStats
from tests.rewards import tiny


def shout(images, prompts):
    """For ``function``: brightness times the number of letters."""
    return images.mean((1, 2, 3)) * torch.tensor([float(len(p)) for p in prompts])


def broken(images):
    return torch.where(torch.arange(len(images)) == 2, float("nan"), 1.0)


@pytest.fixture
def folder(tmp_path):
    """Grey pictures of rising brightness with prompts, listed out of the order of their names."""
    rows = []
    for i in (2, 0, 1):
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "x" * (i + 1)})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def function(name, **settings):
    return RewardMetric("function", {"path": f"{__file__}:{name}", "differentiable": False, **settings})


def test_digits_by_their_labels():
    images = read_images("digits")
    x, y = images.load(torch.arange(100)), images.labels[:100]
    result = evaluate(None, (x, y), metrics=["reward:digits", "accuracy"], quiet=True)
    want = rewards.make("digits")(x.float() / 255, y)
    assert result.values["digits"] == pytest.approx(float(want.mean()), rel=1e-4)
    assert result.protocol.metrics["reward:digits"] == {
        "reward": "digits",
        "reward_settings": {"wanted": None, "network": "trained"},
    }
    with pytest.raises(ValueError, match="'reward:digits' needs generated labels"):
        evaluate(None, x, metrics=["reward:digits"], quiet=True)


def test_two_rewards_at_once_and_one_twice():
    x = read_images("digits").load(torch.arange(20))
    jpeg, seven = get_metric("reward:jpeg"), RewardMetric("digits", {"wanted": 7})
    assert set(evaluate(None, x, metrics=[jpeg, seven], quiet=True).values) == {"jpeg", "digits"}
    with pytest.raises(ValueError, match="'reward:jpeg' is named twice"):
        evaluate(None, x, metrics=["reward:jpeg", jpeg], quiet=True)


def test_prompts_of_a_folder_meet_their_images(folder):
    metric = function("shout", takes="prompts")
    assert metric.reads_generated == ("images", "prompts")
    result = evaluate(None, folder, metrics=[metric], extractor="none", quiet=True)
    assert result.values["function"] == pytest.approx((0 * 1 + 50 * 2 + 100 * 3) / 255 / 3, rel=1e-5)
    drawn = evaluate(None, folder, metrics=[metric], extractor="none", n=2, quiet=True).values["function"]
    pairs = [50 * 2, 50 * 2 + 300, 300]
    assert min(abs(drawn - pair / 255 / 2) for pair in pairs) < 1e-6


@pytest.mark.parametrize("name", ["clip_score", "pick_score"])
def test_scores_of_clip_models(name, tmp_path):
    clip = tiny.clip(tmp_path)
    settings = {"model": clip} | ({"tokenizer": clip} if name == "pick_score" else {})
    images, with_prompts, texts = captioned()
    got = evaluate(None, with_prompts, metrics=[RewardMetric(name, settings)], extractor="none", quiet=True)
    want = rewards.make(name, quantise=True, **settings)(images / 255, texts)
    assert got.values == {name: pytest.approx(float(want.mean()), rel=1e-4)}
    assert got.protocol.metrics[f"reward:{name}"]["reward_settings"]["model"] == clip
    # By text, and as it is in training.
    text = f"reward:{name}:" + ",".join(f"{k}={v}" for k, v in settings.items()) + ",quantise=False"
    (metric,) = split(text)
    plain = evaluate(None, with_prompts, metrics=[metric], extractor="none", quiet=True)
    smooth = rewards.make(name, **settings)(images / 255, texts)
    assert plain.values == {name: pytest.approx(float(smooth.mean()), rel=1e-4)}
    assert plain.protocol.metrics[f"reward:{name}"]["reward_settings"]["quantise"] is False
    with pytest.raises(ValueError, match="different settings of 'reward:"):
        require_comparable([got, plain])


def captioned():
    images, texts = (torch.rand(4, 3, 40, 40) * 255).byte(), ["a red cat", "hen", "two dogs", "a"]
    return images, replace(read_images(images), prompts=texts), texts


def test_clip_score_as_its_paper_has_it(tmp_path):
    """2.5 max(cos, 0) of each image with a prefix, beside the 100 cos of papers on generation."""
    clip = tiny.clip(tmp_path)
    images, with_prompts, texts = captioned()
    cosines = rewards.make("clip_score", model=clip, quantise=True)(
        images / 255, [f"A photo depicts {t}" for t in texts]
    )
    metric = RewardMetric("clip_score", {"model": clip, "convention": "hessel"})
    assert metric.every(None, feature_set(with_prompts))["clip_score_hessel"].tolist() == pytest.approx(
        (cosines.clamp(min=0) / 40).tolist(), rel=1e-4, abs=1e-6
    )
    with torch.no_grad():
        metric._reward.model.visual_projection.weight.neg_()
    below = metric.every(None, feature_set(with_prompts))["clip_score_hessel"]
    assert below.tolist() == pytest.approx(((-cosines).clamp(min=0) / 40).tolist(), rel=1e-4, abs=1e-6)
    both = [f"reward:clip_score:model={clip},convention=hessel", f"reward:clip_score:model={clip}"]
    values = evaluate(None, with_prompts, metrics=both, extractor="none", quiet=True).values
    assert set(values) == {"clip_score", "clip_score_hessel"}
    with pytest.raises(ValueError, match="convention"):
        RewardMetric("clip_score", {"model": clip, "convention": "torchmetrics"})


class _Torchmetrics4(torch.nn.Module):
    """A CLIP whose features are tensors, as with transformers 4, for which torchmetrics 1.9 was written."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels):
        found = self.model.get_image_features(pixels)
        return found if isinstance(found, torch.Tensor) else found.pooler_output

    def get_text_features(self, ids, mask):
        found = self.model.get_text_features(ids, mask)
        return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.parametrize("below", [False, True])
def test_clip_score_against_torchmetrics(tmp_path, below):
    """The same mean of 100 cosines; where that is negative torchmetrics gives 0, having cut off no single one."""
    clip_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

    clip = tiny.clip(tmp_path)
    metric = RewardMetric("clip_score", {"model": clip})
    sized = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(CLIPImageProcessor(**sized), metric._reward.tokenizer)
    model = CLIPModel.from_pretrained(clip).eval()
    images, texts = (torch.rand(4, 3, 32, 32) * 255).byte(), ["a red cat", "hen", "two dogs", "a"]
    cosines = metric.every(None, feature_set(replace(read_images(images), prompts=texts)))["clip_score"]
    if bool(cosines.mean() < 0) is not below:
        for one in (model, metric._reward.model):
            one.visual_projection.weight.data.neg_()
    mean = metric(None, feature_set(replace(read_images(images), prompts=texts)))["clip_score"]
    assert (mean < 0) is below
    with torch.no_grad():
        theirs = clip_score(images, texts, model_name_or_path=lambda: (_Torchmetrics4(model), processor))
    assert float(theirs) == pytest.approx(max(mean, 0), rel=1e-4, abs=1e-4)


def feature_set(images):
    return FeatureSet(FeatureStats(0), images=images, prompts=images.prompts)


def test_batches_change_nothing(folder):
    images = read_images("digits").load(torch.arange(20))
    values = [
        evaluate(None, images, metrics=[RewardMetric("digits", {"wanted": 3}, batch_size=b)], quiet=True).values[
            "digits"
        ]
        for b in (7, 64)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_prompts_that_are_missing(folder):
    with pytest.raises(ValueError, match="'reward:function' needs generated prompts"):
        images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        evaluate(None, images, metrics=[function("shout", takes="prompts")], extractor="none", quiet=True)
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    rows[1] = json.dumps({"file_name": "0.png"})
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"no text for 0\.png \(1 images lack one\)"):
        read_images(folder)


def test_bad_settings():
    with pytest.raises(ValueError, match="reward='jpg' is not known; did you mean 'jpeg'"):
        get_metric("reward:jpg")
    with pytest.raises(ValueError, match="metrics='reward': accepted is 'reward:REWARD'"):
        get_metric("reward")
    with pytest.raises(ValueError, match="metrics='frechet:1': accepted is 'frechet'"):
        get_metric("frechet:1")
    with pytest.raises(ValueError, match="batch_size=0"):
        RewardMetric("jpeg", batch_size=0)
    with pytest.raises(ValueError, match="quality"):
        RewardMetric("jpeg", {"quality": 0})


def test_a_reward_that_is_not_finite_names_its_image():
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="reward:function: the reward of image 2 is not finite"):
        evaluate(None, images, metrics=[function("broken")], extractor="none", quiet=True)
