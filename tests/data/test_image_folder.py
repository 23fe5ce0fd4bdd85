import json

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import data


def picture(path, size=(40, 24), colour=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels if colour is None else np.broadcast_to(np.uint8(colour), pixels.shape)).save(path)


def open_folder(path, **settings):
    return data.make("image_folder", path=path, **{"size": 16, **settings})


def test_classes_are_sub_folders(tmp_path):
    for i, name in enumerate(["cat", "ant", "cat"]):
        picture(tmp_path / name / f"{i}.png", seed=i)
    (tmp_path / "cat" / "notes.md").write_text("not a picture")
    source = open_folder(tmp_path)
    assert source.class_names == ["ant", "cat"] and source.num_classes == 2 and len(source) == 3
    batch = source.__getitems__([0, 1, 2])
    assert batch["x0"].shape == (3, 3, 16, 16) and source.shape == (3, 16, 16)
    assert batch["class_labels"].tolist() == [0, 1, 1] and set(batch) == {"x0", "class_labels"}


def test_flat_folder_with_metadata_lists_what_is_used(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    picture(tmp_path / "more" / "3.png", seed=3)
    lines = [{"file_name": f"{i}.png", "text": text} for i, text in [(2, "two"), (0, "zero"), ("more/3", "three")]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = open_folder(tmp_path)
    batch = source.__getitems__([0, 1, 2])
    assert len(source) == 3 and source.num_classes is None
    assert batch["prompts"] == ["two", "zero", "three"] and set(batch) == {"x0", "prompts"}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "more" / "3.png").rename(tmp_path / ".3.png")
    plain = open_folder(tmp_path)
    assert len(plain) == 3
    assert torch.equal(plain.__getitems__([2])["x0"][0], batch["x0"][0]) and "prompts" not in plain.__getitems__([0])


def test_captions_beside_pictures(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    assert open_folder(tmp_path).__getitems__([1, 0])["prompts"] == ["caption b", "caption a"]
    picture(tmp_path / "c.png")
    with pytest.raises(FileNotFoundError, match="c.txt"):
        open_folder(tmp_path)


@pytest.mark.parametrize("resize", ["bilinear", "bicubic", "lanczos", "adm"])
def test_values_and_centre_crop(tmp_path, resize):
    """The sides of a wide picture differ from its middle, which alone survives, its value exact."""
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 12:84] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x0 = open_folder(tmp_path, size=8, resize=resize).__getitems__([0])["x0"][0]
    torch.testing.assert_close(x0, torch.tensor([1.0, -1.0, 51 / 127.5 - 1]).view(3, 1, 1).expand(3, 8, 8))


def test_resize_rules_differ_and_upscale(tmp_path):
    picture(tmp_path / "a.png", size=(101, 67))
    results = [
        open_folder(tmp_path, resize=r).__getitems__([0])["x0"] for r in ("bilinear", "bicubic", "lanczos", "adm")
    ]
    for i, a in enumerate(results):
        assert all((a - b).abs().max() > 0.01 for b in results[:i])
    assert open_folder(tmp_path, size=200).__getitems__([0])["x0"].shape == (1, 3, 200, 200)
    assert open_folder(tmp_path, mode="L").__getitems__([0])["x0"].shape == (1, 1, 16, 16)


def test_flip_is_drawn_per_visit(tmp_path):
    picture(tmp_path / "a.png")
    source, plain = open_folder(tmp_path, horizontal_flip=True), open_folder(tmp_path).__getitems__([0])["x0"][0]
    visits = source.__getitems__(range(200))["x0"]
    flipped = [torch.equal(v, plain.flip(2)) for v in visits]
    assert all(torch.equal(v, plain) != f for v, f in zip(visits, flipped, strict=True))
    assert 70 < sum(flipped) < 130
    assert torch.equal(source.__getitems__([17])["x0"][0], visits[17])
    other = open_folder(tmp_path, horizontal_flip=True, seed=1).__getitems__(range(200))["x0"]
    assert not torch.equal(other, visits)


def test_exif_orientation(tmp_path):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    x0 = open_folder(tmp_path).__getitems__([0])["x0"][0]
    assert bool((x0[:, :8] == -1).all()) and bool((x0[:, 8:] == 1).all())


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no pictures"):
        open_folder(tmp_path)
    picture(tmp_path / "good.png")
    with pytest.raises(ValueError, match="size"):
        open_folder(tmp_path, size=0)
    with pytest.raises(ValueError, match="resize"):
        open_folder(tmp_path, resize="nearest")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "void.jpg").write_bytes(b"nothing")
    source = open_folder(tmp_path)
    for i, name in [(1, "torn.png"), (2, "void.jpg")]:
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            source.__getitems__([0, i])
    picture(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match="good.png lies beside the class sub-folders"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "line, error, message",
    [
        ('{"file_name": "gone.png", "text": "x"}', FileNotFoundError, "line 2: .*gone.png is not there"),
        ('{"file_name": "a.png"}', ValueError, "line 2: wanted"),
        ('{"file_name": "a.png", "text": null}', ValueError, "line 2: wanted"),
        ("{oops", ValueError, "line 2: wanted"),
        ("[1]", ValueError, "line 2: wanted"),
    ],
)
def test_bad_metadata(tmp_path, line, error, message):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}\n' + line)
    with pytest.raises(error, match=message):
        open_folder(tmp_path)
