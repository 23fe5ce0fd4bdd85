"""Verdicts and preferences: what scores become, who is paired with whom, what both sources refuse."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from genkit import data
from genkit.data.pairs import FORMAT, noise, sha256, shard_paths
from tests.data.test_image_folder import picture


def pictures(folder, rows):
    """A folder of plain grey pictures; ``rows`` are metadata without the file's name, grey 10 times their number."""
    for i in range(len(rows)):
        picture(folder / f"{i}.png", colour=10 * i)
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a cat", **row}) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return dict(name="image_folder", path=folder, size=4)


def shards(folder, scores, labels=None, prompts=None, reward="digits", size=4):
    """Pairs in the format of `genkit pairs`, whose samples tell their number."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(scores)
    manifest = dict(
        format=FORMAT, shape=[2], seed=0, num=n, shard_size=size, noise_check=noise(0, [0], (2,)).flatten().tolist()
    )
    manifest |= dict(asked={"as": "prompt" if prompts else "class_labels" if labels else None})
    manifest |= dict(num_classes=10 if labels else None, reward=reward and {"name": reward})
    (folder / "pairs.json").write_text(json.dumps(manifest))
    for number, start in enumerate(range(0, n, size)):
        rows = torch.arange(start, min(start + size, n))
        tensors = {"x0": rows[:, None].expand(-1, 2).float().contiguous(), "item": rows}
        if reward:
            tensors["score"] = torch.tensor(scores, dtype=torch.float32)[rows]
        if labels:
            tensors["class_labels"] = torch.tensor(labels)[rows]
        file, record = shard_paths(folder, number)
        words = {"prompts": json.dumps([prompts[i] for i in rows.tolist()])} if prompts else {}
        save_file(tensors, file, {"format": "pt", **words})
        entry = dict(first=start, stop=start + len(rows), count=len(rows), skipped=[])
        record.write_text(json.dumps(entry | {"bytes": file.stat().st_size, "sha256": sha256(file)}))
    return dict(name="pairs", path=folder)


def number(x):
    return x.flatten(1)[:, 0].long().tolist()


# -- feedback --------------------------------------------------------------------------------------------------------


def test_a_threshold_makes_verdicts_and_shares(tmp_path):
    source = data.make("feedback", samples=shards(tmp_path, [0.7, 0.1, 0.2, 0.9, 0.3, 0.69]), threshold=0.7)
    batch = source.__getitems__(range(6))
    assert batch["score"].tolist() == [1, 0, 0, 1, 0, 0] and "eps" not in batch and number(batch["x0"]) == [*range(6)]
    assert batch["share"].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert source.accepted == pytest.approx(1 / 3) and source.shape == (2,) and len(source) == 6


def test_scalar_verdicts(tmp_path):
    source = data.make("feedback", samples=shards(tmp_path, [-5.0, 0.0, 1.0, 2.0, 9.0]), low=0.0, high=2.0)
    batch = source.__getitems__([4, 3, 2, 1, 0, 5])
    assert batch["score"].tolist() == [1, 1, 0.5, 0, 0, 0]
    assert batch["share"].tolist() == pytest.approx([2 / 5, 2 / 5, 1, 2 / 5, 2 / 5, 2 / 5])
    sign = 2 * batch["score"][:5] - 1
    assert (sign.clamp(min=0) / batch["share"][:5]).mean().item() == pytest.approx(1)  # each group weighs 1 in the mean
    assert (sign.clamp(max=0) / batch["share"][:5]).mean().item() == pytest.approx(-1)


def test_verdicts_as_they_are(tmp_path):
    source = data.make("feedback", samples=pictures(tmp_path, [{"score": 1}, {"score": 0}, {"score": 0.25}]))
    batch = source.__getitems__([2, 0])
    assert batch["score"].tolist() == [0.25, 1] and batch["prompts"] == ["a cat"] * 2
    assert batch["x0"].shape == (2, 3, 4, 4) and source.shape == (3, 4, 4)


@pytest.mark.parametrize(
    "settings, scores, text",
    [
        (dict(threshold=5), [0.5, 1.0], "none of 2 samples is accepted; the scores go from 0.5 to 1"),
        (dict(), [0.5, 1.5], r"scores from 0.5 to 1.5 are no verdicts in \[0, 1\]; set threshold, or low and high"),
        (dict(low=1.0), [1.0], "low=1.0 and high=None must be set together"),
        (dict(low=1.0, high=1.0), [1.0], "low=1.0 must be below high=1.0"),
        (dict(low=0.0, high=1.0, threshold=0.5), [1.0], "are two rules; set one"),
    ],
)
def test_bad_verdicts(settings, scores, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        data.make("feedback", samples=shards(tmp_path, scores), **settings)


def test_bad_scores(tmp_path):
    for samples in (dict(name="digits"), shards(tmp_path / "old", [1.0], reward=None), pictures(tmp_path / "p", [{}])):
        for name in ("feedback", "preferences"):
            with pytest.raises(ValueError, match=f"data.samples='{samples['name']}' has no scores; accepted is"):
                data.make(name, samples=samples)
    for score in ("good", None, True, float("nan")):
        with pytest.raises(ValueError, match="1.png: its score in metadata.jsonl is .*; accepted is a finite number"):
            data.make("feedback", samples=pictures(tmp_path / "q", [{"score": 1}, {"score": score}]))
    with pytest.raises(ValueError, match="data.samples.name='pair' is not known"):
        data.make("feedback", samples=dict(name="pair"))


def test_older_pairs_are_read(tmp_path):
    samples = shards(tmp_path, [1.0, 2.0], reward=None)
    manifest = json.loads((tmp_path / "pairs.json").read_text())
    del manifest["reward"]
    (tmp_path / "pairs.json").write_text(json.dumps(manifest))
    source = data.make(**samples)
    assert source.scores() is None and source.groups() is None and "score" not in source.__getitems__([0])


# -- preferences -----------------------------------------------------------------------------------------------------


def pairs(source):
    batch = source.__getitems__(range(len(source)))
    return list(zip(number(batch["x0"]), number(batch["lose"]), strict=True)), batch


def test_the_best_meets_the_worst_of_its_prompt(tmp_path, caplog):
    scores = [0.1, 5.0, 0.9, 4.0, 0.5, 5.0, 3.0, 3.0]
    prompts = ["a", "b", "a", "b", "a", "c", "d", "d"]
    with caplog.at_level(logging.WARNING, "genkit.data"):
        source = data.make("preferences", samples=shards(tmp_path, scores, prompts=prompts))
    found, batch = pairs(source)
    assert found == [(2, 0), (1, 3)] and batch["prompts"] == ["a", "b"] and set(batch) == {"x0", "lose", "prompts"}
    assert source.skipped == 2 and "2 of 4 prompts have no pair of samples and are left out" in caplog.text
    assert source.sample_fields == ("x0", "lose")


def test_several_pairs_of_a_label_and_a_threshold(tmp_path):
    samples = shards(tmp_path, [6.0, 1.0, 5.0, 2.0, 4.0, 3.0, 9.0], labels=[7] * 6 + [1])
    found, batch = pairs(data.make("preferences", samples=samples, pairs_per_group=9))
    assert found == [(0, 1), (2, 3), (4, 5)] and batch["class_labels"].tolist() == [7] * 3
    assert pairs(data.make("preferences", samples=samples, pairs_per_group=2))[0] == found[:2]
    assert pairs(data.make("preferences", samples=samples, pairs_per_group=9, threshold=4.5))[0] == found[:2]
    with pytest.raises(ValueError, match="none of 2 prompts has both .* 7 scores go from 1 to 9, threshold=0.5"):
        data.make("preferences", samples=samples, threshold=0.5)


def test_ties_are_settled_by_order(tmp_path):
    samples = shards(tmp_path, [1.0, 2.0, 2.0, 1.0, 1.0])
    assert pairs(data.make("preferences", samples=samples, pairs_per_group=5))[0] == [(1, 4), (2, 3)]


def test_pictures_with_groups(tmp_path):
    """Groups stand in place of prompts: a prompt may have several pairs."""
    rows = [dict(score=s, group=g) for s, g in ((1, "x"), (0, "x"), (0, "y"), (1, "y"))]
    source = data.make("preferences", samples=pictures(tmp_path, rows))
    batch = source.__getitems__([0, 1])
    grey = [((batch[k][:, 0, 0, 0] + 1) * 127.5 / 10).round().tolist() for k in ("x0", "lose")]
    assert grey == [[0, 3], [1, 2]] and batch["prompts"] == ["a cat"] * 2
    rows[1]["text"] = "a dog"
    source = data.make("preferences", samples=pictures(tmp_path, rows))
    with pytest.raises(ValueError, match="a group holds samples of several prompts: 'a cat' and 'a dog'"):
        source.__getitems__([0])
    del rows[2]["group"]
    with pytest.raises(ValueError, match="2.png: other pictures of metadata.jsonl have a group"):
        data.make("preferences", samples=pictures(tmp_path, rows))


def test_both_of_a_pair_are_flipped_alike(tmp_path):
    for i, seed in enumerate((0, 0)):
        picture(tmp_path / f"{i}.png", seed=seed)
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a", "score": i}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    samples = dict(name="image_folder", path=tmp_path, size=8, horizontal_flip=True)
    batch = data.make("preferences", samples=samples).__getitems__(range(20))
    assert torch.equal(batch["x0"], batch["lose"]) and not torch.equal(
        batch["x0"][:1].expand(20, -1, -1, -1), batch["x0"]
    )


def test_only_the_model_that_made_the_pairs_is_trained(tmp_path):
    from genkit.networks.dit import DiT

    samples = shards(tmp_path, [0.0, 1.0])
    manifest = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(manifest | dict(weights="0" * 64, pipeline="p", network="DiT")))
    network = DiT(hidden_size=16, num_layers=1, num_heads=2)
    for name in ("feedback", "preferences"):
        with pytest.raises(ValueError, match="any_model=true"):
            data.make(name, samples=samples).check_network(network)
        data.make(name, samples=samples | dict(any_model=True)).check_network(network)
