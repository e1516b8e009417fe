from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dina_reward.data.files import decode_image, read_lines, to_rgb


AFTER = struct.pack("<I", 8 + 2 + 24 + 4)


def damaged_exif(tag: int, kind: int, payload: bytes, tail: bytes = b"") -> bytes:
    """Orientation 6, and a second entry of the wrong kind."""
    entries = [
        struct.pack("<HHI", 0x0112, 3, 1) + struct.pack("<HH", 6, 0),
        struct.pack("<HHI", tag, kind, 1) + payload,
    ]
    head = b"Exif\x00\x00II*\x00" + struct.pack("<I", 8) + struct.pack("<H", 2)
    return head + b"".join(entries) + struct.pack("<I", 0) + tail


@pytest.mark.parametrize(
    "block",
    [
        damaged_exif(0x011A, 10, AFTER, struct.pack("<ii", -1, 0)),
        damaged_exif(0x0100, 9, struct.pack("<i", -5)),
        damaged_exif(0x0201, 1, b"\x01\0\0\0"),
        damaged_exif(0x011A, 11, struct.pack("<f", float("nan"))),
    ],
)
def test_a_damaged_exif_block_costs_no_pixel(block: bytes) -> None:
    data = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(data, "JPEG", exif=block)
    image = decode_image(data, "it")
    assert image.size in ((32, 24), (24, 32))
    assert np.asarray(image)[..., 0].min() > 240


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    back = [
        pixels,
        pixels[:, ::-1],
        pixels[::-1, ::-1],
        pixels[::-1],
        pixels.T,
        np.rot90(pixels),
        pixels[::-1, ::-1].T,
        np.rot90(pixels, -1),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(back[orientation - 1])).save(data, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode_image(data, "it"))[..., 0], pixels)


def test_gray_of_16_bits_and_of_floats_keeps_its_brightness() -> None:
    data = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(data, "PNG")
    assert np.asarray(decode_image(data, "it"))[0, :, 1].tolist() == [0, 100, 255]
    data = io.BytesIO()
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(data, "TIFF")
    assert np.asarray(decode_image(data, "it"))[0, :, 2].tolist() == [0, 128, 255]
    for values in (
        np.array([[0, 2.0]], np.float32),
        np.array([[np.nan, 1]], np.float32),
        np.array([[-1, 70000]], np.int32),
    ):
        with pytest.raises(ValueError, match="whose brightness is unknown"):
            to_rgb(Image.fromarray(values))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (32, 32)).save(data, "PNG")
    path = tmp_path / "cut.png"
    for content in (data.getvalue()[:-30], b"", b"no image"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read \(cut.png\)"):
            decode_image(path, path.name)
    with pytest.raises(ValueError, match="cannot be read"):
        decode_image(tmp_path, "a folder")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red circle \r\n\r\na blue\u2028square\x85é\n".encode(encoding))
    assert read_lines(path) == ["a red circle", "a blue\u2028square\x85é"]


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("fine\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 2 of .*prompts.txt is not UTF-8"):
        read_lines(path)
    with pytest.raises(ValueError, match="is no file"):
        read_lines(tmp_path)
    path.write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match=r"prompts.txt is damaged"):
        read_lines(path)
