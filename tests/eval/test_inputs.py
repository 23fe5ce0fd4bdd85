import json

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.eval.inputs import read_images, to_uint8


def pictures(n=4, c=1, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, size, size), generator=g, dtype=torch.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)


def everything(images):
    return images.load(torch.arange(images.n))


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-1.0, -0.997, 0.0, 0.999, 1.0, 3.0, -3.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255, 0]
    x = torch.arange(256) / 127.5 - 1
    assert torch.equal(to_uint8(x), torch.arange(256).to(torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="float images"):
        to_uint8(torch.zeros(2, dtype=torch.int64))


def test_digits():
    images = read_images("digits")
    assert images.n == 1797 and images.labels.bincount().sum() == 1797
    first = images.load(torch.tensor([3, 0]))
    assert first.shape == (2, 1, 8, 8) and first.dtype == torch.uint8 and images.labels[3] == 3


def test_tensors():
    x, y = pictures(), torch.tensor([1, 2, 3, 4])
    assert torch.equal(everything(read_images((x, y))), x) and torch.equal(read_images((x, y)).labels, y)
    with pytest.raises(ValueError, match="to_uint8 converts"):
        read_images(x.float())
    with pytest.raises(ValueError, match="no images"):
        read_images(x[:0])
    with pytest.raises(ValueError, match="labels must be 4 integers"):
        read_images((x, y[:3]))


def test_batches_and_subsets():
    x, y = pictures(5), torch.arange(5)
    images = read_images((x, y))
    assert [len(b) for b in images.batches(2)] == [2, 2, 1]
    part = images.subset(torch.tensor([4, 1])).subset(torch.tensor([1]))
    assert torch.equal(everything(part), x[[1]]) and part.labels.tolist() == [1]


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path, channels):
    x = pictures(3, channels)
    for i, image in enumerate(x):
        save(tmp_path / f"{i}.png", image)
    images = read_images(tmp_path)
    assert torch.equal(everything(images), x) and images.labels is None


def test_folder_labels_from_sub_folders(tmp_path):
    for i, name in enumerate(["10", "2", "10"]):
        save(tmp_path / name / f"{i}.png", pictures(1)[0])
    assert read_images(tmp_path).labels.tolist() == [10, 10, 2]
    save(tmp_path / "cat" / "x.png", pictures(1)[0])  # not all numbers: places in sorted order
    assert read_images(tmp_path).labels.tolist() == [0, 0, 1, 2]


def test_folder_labels_from_metadata(tmp_path):
    for i in range(2):
        save(tmp_path / "sub" / f"{i}.png", pictures(1)[0])
    lines = [json.dumps({"file_name": f"sub/{i}.png", "label": 7 - i}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert read_images(tmp_path).labels.tolist() == [7, 6]
    (tmp_path / "metadata.jsonl").write_text(lines[0])
    assert read_images(tmp_path).n == 1  # the other file is no part of the set
    (tmp_path / "metadata.jsonl").write_text(lines[0] + "\n" + json.dumps({"file_name": "sub/1.png"}))
    with pytest.raises(ValueError, match="no label for sub/1.png"):
        read_images(tmp_path)


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        read_images(tmp_path)
    save(tmp_path / "a.png", pictures(1)[0])
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.png: cannot be read"):
        read_images(tmp_path)
    save(tmp_path / "b.png", pictures(1, size=9)[0])
    with pytest.raises(ValueError, match=r"mixed images: .*a.png is .*8, 8.*b.png is .*9, 9"):
        read_images(tmp_path)
    save(tmp_path / "b.png", pictures(1, 3)[0])
    with pytest.raises(ValueError, match="mixed images"):
        read_images(tmp_path)
    Image.new("RGBA", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png: image mode 'RGBA'"):
        read_images(tmp_path)


def test_a_truncated_image_is_named(tmp_path):
    save(tmp_path / "a.png", pictures(1, 3, 64)[0])
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    images = read_images(tmp_path)  # the header is whole
    with pytest.raises(ValueError, match="a.png: cannot be decoded"):
        everything(images)


@pytest.mark.parametrize("key, labels", [("arr_0", "arr_1"), ("images", "labels")])
def test_npz(tmp_path, key, labels):
    x, y = pictures(5, 3), np.arange(5)
    np.savez(tmp_path / "x.npz", **{key: x.permute(0, 2, 3, 1).numpy(), labels: y})
    images = read_images(str(tmp_path / "x.npz"))
    assert torch.equal(everything(images), x) and images.labels.tolist() == y.tolist()
    np.savez(tmp_path / "x.npz", **{key: x.numpy()})
    assert torch.equal(everything(read_images(tmp_path / "x.npz")), x)
    np.savez(tmp_path / "x.npz", **{key: x[:, 0].numpy()})
    assert torch.equal(everything(read_images(tmp_path / "x.npz")), x[:, :1])


def test_npz_errors(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match="x.npz: no such file"):
        read_images(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.npz: not a readable"):
        read_images(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match=r"'images' or 'arr_0', found \['other'\]"):
        read_images(path)
    np.savez(path, arr_0=np.zeros((2, 8, 8, 1), dtype=np.float32))
    with pytest.raises(ValueError, match="must be uint8"):
        read_images(path)
    np.savez(path, arr_0=np.zeros((2, 3, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="which axis"):
        read_images(path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="a folder of images or a .npz"):
        read_images(tmp_path / "x.txt")
