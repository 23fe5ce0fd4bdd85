"""Data sets of the datasets library as sets of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.eval.inputs import read_images

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "caption": datasets.Value("string"),
        }
    )
    rows = {
        "image": [Image.fromarray(p) for p in pixels],
        "label": [0, 1, 0, 1, 1, 0],
        "caption": [f"picture {i}" for i in range(6)],
    }
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(path)
    return path, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_a_local_data_set(folder):
    path, pixels = folder
    images = read_images(f"datasets:path={path},split=test,label_column=label,caption_column=caption", size=8)
    assert images.n == 6 and torch.equal(images.load(torch.arange(6)), pixels)
    assert images.labels.tolist() == [0, 1, 0, 1, 1, 0] and images.class_names == {0: "cat", 1: "dog"}
    assert images.prompts[3] == "picture 3" and images.kind == "uint8 RGB 8x8, centre crop (adm)"
    small = read_images(f"datasets:path={path},split=test,size=4")
    assert small.load(torch.tensor([1])).shape == (1, 3, 4, 4) and small.labels is None


def test_bad_names_are_refused(folder):
    path, _ = folder
    for text, settings, match in (
        (f"datasets:path={path},split=test", {}, "size: Field required"),
        (f"datasets:path={path},split=train,size=8", {}, "split.*train.*test"),
        (f"datasets:path={path},split=test,size=8,colour=1", {}, "colour"),
        (f"datasets:path={path},split=test,size=8", {"size": 4}, "size=4 and in .* size=8: give one"),
        (f"datasets:path={path},split=test", {"size": 4, "crop": "squash"}, "crop='squash'.*accepted is 'center'"),
        ("datasets:size=8", {}, "path: Field required"),
        ("hf:", {}, "a name of the Hub"),
        ("hf:some/name,path=other", {}, "names path='other' too"),
    ):
        with pytest.raises(ValueError, match=match):
            read_images(text, **settings)


def test_a_name_of_the_hub_is_what_is_asked_for(monkeypatch):
    asked = []

    def load_dataset(path, name, **settings):
        asked.append((path, name, settings))
        raise FileNotFoundError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError):
        read_images("hf:some/name,split=test[:10],size=8".replace("test[:10]", "'test[:10]'"))
    assert asked == [("some/name", None, {"split": "test[:10]", "revision": None})]
