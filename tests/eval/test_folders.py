"""Folders and zips of image files."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data._images import ImageConfig, prepare
from genkit.eval.inputs import UnreadableImage, read_images, to_uint8
from genkit.eval.run import evaluate


def pictures(n=4, c=1, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, size, size), generator=g, dtype=torch.uint8)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    pil(image).save(path)


def everything(images):
    return images.load(torch.arange(images.n))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("zipped", [False, True])
def test_folder_and_zip(tmp_path, channels, zipped):
    x = pictures(3, channels)
    folder = tmp_path / "set"
    for i, image in enumerate(x):
        save(folder / str(7 - i) / f"{i}.png", image)
    path = folder
    if zipped:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("__MACOSX/5/._0.png", b"nothing")
            for p in sorted(folder.rglob("*.png")):
                file.write(p, p.relative_to(folder).as_posix())
    images = read_images(path)
    assert torch.equal(everything(images), x.flip(0)) and images.labels.tolist() == [5, 6, 7]
    assert images.name == "set" and images.kind == f"PNG {'L' if channels == 1 else 'RGB'} 8x8" and not images.notes


def test_folder_labels_from_sub_folders(tmp_path):
    for i, name in enumerate(["10", "2", "10"]):
        save(tmp_path / name / f"{i}.png", pictures(1)[0])
    images = read_images(tmp_path)
    assert images.labels.tolist() == [10, 10, 2] and images.class_names is None
    save(tmp_path / "cat" / "x.png", pictures(1)[0])  # not all numbers: places in sorted order
    images = read_images(tmp_path)
    assert images.labels.tolist() == [0, 0, 1, 2] and images.class_names == {0: "10", 1: "2", 2: "cat"}
    (tmp_path / "2" / "1.png").write_bytes(b"")  # a class of which nothing is left keeps its number
    assert read_images(tmp_path).labels.tolist() == [0, 0, 2]


def test_folder_labels_and_prompts_from_metadata(tmp_path):
    for i in range(2):
        save(tmp_path / "sub" / f"{i}.png", pictures(1)[0])
    rows = [{"file_name": f"sub/{i}.png", "label": 7 - i, "text": f"a {i}"} for i in range(2)]
    metadata = tmp_path / "metadata.jsonl"

    def write(*rows):
        metadata.write_text("\n".join(map(json.dumps, rows)))

    write(*rows)
    images = read_images(tmp_path)
    assert images.labels.tolist() == [7, 6] and images.prompts == ["a 0", "a 1"]
    write(rows[0])
    assert read_images(tmp_path).n == 1  # the other file is no part of the set
    write(rows[0], {"file_name": "sub/1.png"})
    with pytest.raises(ValueError, match="no label for sub/1.png"):
        read_images(tmp_path)
    write(rows[0], {"file_name": "sub/1.png", "label": 1})
    with pytest.raises(ValueError, match="no text for sub/1.png"):
        read_images(tmp_path)
    write(rows[0], rows[1] | {"label": "cat"})
    with pytest.raises(ValueError, match="label='cat' of sub/1.png: expected an integer"):
        read_images(tmp_path)
    write(*rows, rows[0] | {"file_name": "sub/none.png"})
    images = read_images(tmp_path)
    assert images.labels.tolist() == [7, 6] and images.prompts == ["a 0", "a 1"] and "sub/none.png" in images.notes[0]
    metadata.write_text('{"file_name": "sub/0.png"}\n{')
    with pytest.raises(ValueError, match="metadata.jsonl: line 2 is not JSON"):
        read_images(tmp_path)
    metadata.write_text("[1]")
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        read_images(tmp_path)


def test_an_empty_folder_or_zip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        read_images(tmp_path)
    zipfile.ZipFile(tmp_path / "x.zip", "w").close()
    with pytest.raises(ValueError, match="x.zip: no images"):
        read_images(tmp_path / "x.zip")
    (tmp_path / "x.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.zip: not a readable .zip"):
        read_images(tmp_path / "x.zip")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 images can be read; a.png: cannot identify"):
        read_images(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nothing"])
def test_a_file_without_a_header_is_left_out_named_and_counted(tmp_path, content):
    x = pictures(5, 3)
    for i, image in enumerate(x):
        save(tmp_path / f"{i}.png", image)
    (tmp_path / "1.png").write_bytes(content)
    images = read_images(tmp_path)
    assert torch.equal(everything(images), x[[0, 2, 3, 4]])
    assert images.notes[0].startswith(f"1 of 5 images of {tmp_path.name} were left out, not readable: 1.png (")
    with pytest.raises(ValueError, match="strict: 1 of 5 images .*1.png"):
        read_images(tmp_path, strict=True)


def test_a_truncated_image_is_named(tmp_path):
    save(tmp_path / "a.png", pictures(1, 3, 64)[0])
    save(tmp_path / "b.png", pictures(1, 3, 64)[0])
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    images = read_images(tmp_path)  # the header is whole
    with pytest.raises(UnreadableImage, match="b.png: cannot be decoded") as caught:
        everything(images)
    assert caught.value.index == 1


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_what_cannot_be_read_is_counted_in_the_result(tmp_path):
    digits = read_images("digits")
    x = digits.load(torch.arange(40))
    for i, image in enumerate(x):
        save(tmp_path / f"{i:02d}.png", image)
    (tmp_path / "03.png").write_bytes(b"")
    content = (tmp_path / "07.png").read_bytes()
    (tmp_path / "07.png").write_bytes(content[:45])
    found = evaluate("digits", tmp_path, metrics=["frechet"], quiet=True)
    assert found.protocol.n_gen == 38
    assert any("1 of 40 images" in note and "03.png" in note for note in found.notes)
    assert any("1 of 39 images" in note and "07.png" in note for note in found.notes)
    assert not any(str(tmp_path) in note for note in found.notes)  # results are sent to others
    (tmp_path / "03.png").unlink()
    with pytest.raises(ValueError, match="07.png"):
        evaluate("digits", tmp_path, metrics=["frechet"], strict=True, quiet=True)


def test_mixed_modes_become_one_with_a_counted_note(tmp_path):
    grey, colour = pictures(2, 1), pictures(2, 3)
    save(tmp_path / "a.png", grey[0])
    save(tmp_path / "b.png", colour[0])
    rgba = pil(colour[1]).convert("RGBA")
    rgba.putalpha(7)
    rgba.save(tmp_path / "c.png")
    images = read_images(tmp_path)
    made = everything(images)
    assert images.kind == "PNG RGB 8x8" and made.shape == (3, 3, 8, 8)
    assert torch.equal(made[0], grey[0].expand(3, -1, -1))
    assert torch.equal(made[2], colour[1])  # as Pillow's convert does, alpha is dropped and not blended
    assert [note.partition(" of ")[0] + note.partition("were")[2] for note in images.notes] == [
        "1 grey, made RGB: a.png",
        "1 with alpha, which was dropped: c.png",
    ]
    with pytest.raises(ValueError, match="strict: 1 of 3 images .*a.png; 1 of 3 .*c.png"):
        read_images(tmp_path, strict=True)
    for name in ("b.png", "c.png"):
        (tmp_path / name).unlink()
    Image.new("LA", (8, 8), (9, 0)).save(tmp_path / "d.png")
    images = read_images(tmp_path)  # grey, all of them
    assert images.kind == "PNG L 8x8" and everything(images).shape == (2, 1, 8, 8) and len(images.notes) == 1


def test_other_modes(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    images = read_images(tmp_path)
    assert images.kind == "JPEG RGB 8x8" and "CMYK" in images.notes[0]
    red, green, blue = everything(images)[0].float().mean((1, 2)).tolist()
    assert red < 5 and green > 250 and blue > 250
    palette = pil(pictures(1, 3)[0]).convert("P")
    palette.save(tmp_path / "b.png")
    assert np.array_equal(everything(read_images(tmp_path))[1].permute(1, 2, 0), np.array(palette.convert("RGB")))
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="c.png: image mode 'I;16B' is not taken; accepted are 8 bits"):
        read_images(tmp_path)
    (tmp_path / "c.png").write_bytes(_png_of_16_bits())
    with Image.open(tmp_path / "c.png") as image:
        assert image.mode == "RGB"  # Pillow does not tell
    with pytest.raises(ValueError, match="c.png: image mode 'RGB;16B' is not taken"):
        read_images(tmp_path)


def _png_of_16_bits():
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = (b"\0" + b"\x12\x34" * 3 * 8) * 8
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_mixed_sizes_need_a_preparation(tmp_path):
    wide, high = pictures(1, 3, 30)[0, :, :12], pictures(1, 3, 30, seed=1)[0, :, :, :17]
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", high)
    with pytest.raises(ValueError, match=r"mixed images of 2 sizes, a.png is 30x12, b.png is 17x30; size=12 with"):
        read_images(tmp_path)
    squashed = read_images(tmp_path, size=5, crop="squash")
    assert squashed.kind == "PNG RGB of 2 sizes, to 5x5 (squashed, bicubic)"
    expected = [np.array(pil(x).resize((5, 5), Image.Resampling.BICUBIC)) for x in (wide, high)]
    assert np.array_equal(everything(squashed).permute(0, 2, 3, 1), np.stack(expected))
    cropped = read_images(tmp_path, size=5)
    assert cropped.kind == "PNG RGB of 2 sizes, to 5x5 (box and bicubic, centre crop)"
    # The rule that sources of data have under the name adm.
    config = ImageConfig(size=5, resize="adm")
    expected = [to_uint8(prepare(pil(x), config, False)) for x in (wide, high)]
    assert torch.equal(everything(cropped), torch.stack(expected))
    with pytest.raises(ValueError, match="size=0"):
        read_images(tmp_path, size=0)
    with pytest.raises(ValueError, match="crop='squash' has no effect without size"):
        read_images(tmp_path, crop="squash")
    with pytest.raises(ValueError, match="crop.*middle.*center"):
        read_images(tmp_path, size=5, crop="middle")


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_jpeg_on_one_side_is_noted(tmp_path):
    x = read_images("digits").load(torch.arange(12))
    for i, image in enumerate(x):
        save(tmp_path / "png" / f"{i}.png", image)
        save(tmp_path / "jpeg" / f"{i}.jpg", image)
    found = evaluate(tmp_path / "jpeg", tmp_path / "png", metrics=["frechet"], quiet=True)
    assert found.protocol.reference_images == "JPEG L 8x8" and found.protocol.generated_images == "PNG L 8x8"
    assert sum("JPEG on one side only" in note for note in found.notes) == 1
    found = evaluate(tmp_path / "jpeg", tmp_path / "jpeg", metrics=["frechet"], quiet=True)
    assert not any("JPEG" in note for note in found.notes)
    save(tmp_path / "jpeg" / "x.png", x[0])
    assert read_images(tmp_path / "jpeg").kind == "JPEG (12) and PNG (1) L 8x8"


def test_a_bad_entry_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for i in range(3):
            content = io.BytesIO()
            pil(pictures(1, 3, seed=i)[0]).save(content, "png")
            file.writestr(f"{i}.png", content.getvalue())
    raw = bytearray((tmp_path / "x.zip").read_bytes())
    where = raw.index(b"1.png") + 60
    raw[where] ^= 255  # a wrong checksum
    (tmp_path / "x.zip").write_bytes(raw)
    images = read_images(tmp_path / "x.zip")
    assert images.n == 2 and "1.png (Bad CRC-32" in images.notes[0]
