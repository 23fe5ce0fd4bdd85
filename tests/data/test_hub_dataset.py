import numpy as np
import pytest
import torch
from PIL import Image

from genkit import data

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for i in range(6)
    ]
    columns = {"picture": pictures, "kind": [0, 1, 2, 0, 1, 2], "number": [0, 1, 2, 3, 4, 9], "said": list("abcdef")}
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y", "z"]),
            "number": datasets.Value("int64"),
            "said": datasets.Value("string"),
        }
    )
    path = tmp_path_factory.mktemp("saved")
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(path / "table")
    datasets.DatasetDict({"train": table, "test": table.select([4])}).save_to_disk(path / "splits")
    return path


def make(path, **settings):
    return data.make("hub_dataset", path=str(path), **{"size": 16, "image_column": "picture", **settings})


def test_columns_become_a_batch(folder):
    source = make(folder / "table", label_column="kind", caption_column="said")
    assert len(source) == 6 and source.num_classes == 3 and source.shape == (3, 16, 16)
    batch = source.__getitems__([4, 6 + 2])
    assert batch["x0"].shape == (2, 3, 16, 16) and batch["x0"].dtype == torch.float32 and batch["x0"].abs().max() <= 1
    assert batch["class_labels"].tolist() == [1, 2] and batch["prompts"] == ["e", "c"]
    assert set(make(folder / "table").__getitems__([0])) == {"x0"}


def test_splits(folder):
    test = make(folder / "splits", split="test")
    assert len(test) == 1
    assert torch.equal(test.__getitems__([0])["x0"], make(folder / "splits").__getitems__([4])["x0"])
    with pytest.raises(ValueError, match="split='tests' is not known; did you mean 'test'"):
        make(folder / "splits", split="tests")


def test_same_pictures_as_an_image_folder(folder, tmp_path):
    table = datasets.load_from_disk(str(folder / "table"))
    table[0]["picture"].save(tmp_path / "0.png")
    other = data.make("image_folder", path=tmp_path, size=16).__getitems__([0])["x0"]
    assert torch.equal(make(folder / "table").__getitems__([0])["x0"], other)


def test_flip_is_drawn_per_visit(folder):
    source, plain = make(folder / "table", horizontal_flip=True), make(folder / "table").__getitems__([2])["x0"][0]
    visits = source.__getitems__(range(2, 6 * 60, 6))["x0"]
    flipped = [torch.equal(v, plain.flip(2)) for v in visits]
    assert all(torch.equal(v, plain) != f for v, f in zip(visits, flipped, strict=True)) and 10 < sum(flipped) < 50


def test_errors(folder):
    with pytest.raises(ValueError, match="image_column='image' is not known.*Accepted: kind, number, picture, said"):
        make(folder / "table", image_column="image")
    with pytest.raises(ValueError, match="label_column='kinds' is not known; did you mean 'kind'"):
        make(folder / "table", label_column="kinds")
    with pytest.raises(ValueError, match="label_column='number' names no classes; set num_classes"):
        make(folder / "table", label_column="number")
    source = make(folder / "table", label_column="number", num_classes=5)
    assert source.__getitems__([3])["class_labels"].tolist() == [3]
    with pytest.raises(ValueError, match=r"holds classes in \[9, 9\]; accepted are 0 to 4"):
        source.__getitems__([5])
    with pytest.raises(ValueError, match=r"caption_column='number' holds \[1\]; wanted texts"):
        make(folder / "table", caption_column="number").__getitems__([1])
    with pytest.raises(ValueError, match="revision='main' is for the Hub"):
        make(folder / "table", revision="main")
