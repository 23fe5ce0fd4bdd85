import numpy as np
import pytest
import torch
from PIL import Image

from genkit.eval.inputs import read_images, to_uint8


def pictures(n=4, c=1, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, size, size), generator=g, dtype=torch.uint8)


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


def test_what_is_no_images_is_refused_by_its_type():
    with pytest.raises(ValueError, match="images of a float: accepted are folders.*generated_images"):
        read_images(1.5)


def test_a_preparation_of_what_is_in_memory():
    x = pictures(3, 3, 12)
    small = read_images(x, size=5, crop="squash")
    assert small.kind == "uint8 RGB 12x12, to 5x5 (squashed, bicubic)"
    whole = Image.fromarray(x[1].permute(1, 2, 0).numpy()).resize((5, 5), Image.Resampling.BICUBIC)
    assert np.array_equal(everything(small)[1].permute(1, 2, 0), np.array(whole))
    assert everything(read_images("digits", size=4)).shape == (1797, 1, 4, 4)
    with pytest.raises(ValueError, match="2 channels cannot be resized"):
        everything(read_images(pictures(2, 2), size=4))
    with pytest.raises(ValueError, match="crop='center' has no effect without size"):
        read_images(x, crop="center")


def test_batches_and_subsets():
    x, y = pictures(5), torch.arange(5)
    images = read_images((x, y))
    assert [len(b) for b in images.batches(2)] == [2, 2, 1]
    part = images.subset(torch.tensor([4, 1])).subset(torch.tensor([1]))
    assert torch.equal(everything(part), x[[1]]) and part.labels.tolist() == [1]


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
    with pytest.raises(ValueError, match="a folder of images, a .zip or a .npz"):
        read_images(tmp_path / "x.txt")
