from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dina_reward.data.sides import (
    VideoFile,
    published_shape,
    read_image,
    read_latent,
    read_video,
    side_name,
    stored_value,
)
from tests.data.preference_files import npy, number, png, write_image


def test_every_way_to_store_an_image(tmp_path: Path) -> None:
    write_image(tmp_path / "x" / "7.png", 7)
    stored = [png(7), {"bytes": png(7), "path": "missing.png"}, {"bytes": None, "path": "x/7.png"}, "x/7.png"]
    stored += [str(tmp_path / "x" / "7.png"), Image.new("RGBA", (4, 3), (7, 0, 0, 9))]
    assert [number(read_image(value, tmp_path)) for value in stored] == [7] * 6
    assert read_image(png(1, (5, 2))).size == (5, 2)


def test_exif_orientation_is_applied() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (5, 2)).save(file, format="PNG", exif=exif)
    image = read_image(file.getvalue())
    assert (image.size, image.mode) == ((2, 5), "RGB")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "neither bytes nor a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (b"", r"cannot be read \(0 bytes\)"),
        ({"bytes": b"xyz", "path": "k.png"}, r"cannot be read \(3 bytes of k.png\)"),
        (png(3)[:40], r"cannot be read \(40 bytes\)"),
        ("none.png", r"none.png does not exist; pass image_root=FOLDER"),
        ("https://host/a.png", "https://host/a.png is a URL; download the images"),
        (5, "expected an image .*got int"),
    ],
)
def test_unreadable_images(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(value)


def test_an_image_that_is_too_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(png(1, (9, 9)))


def test_names_are_paths_or_digests_of_content() -> None:
    assert side_name("a/b.png") == side_name({"bytes": None, "path": "a/b.png"}) == "a/b.png"
    assert side_name(png(1)) == side_name({"bytes": png(1), "path": "image.png"})
    latents = [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.ones((2, 3), np.float32)]
    names = {side_name(value) for value in (png(1), png(2), {"bytes": png(3), "path": "image.png"}, *latents)}
    assert len(names) == 6
    assert all(name.startswith("sha256:") for name in names)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents(dtype: Any) -> None:
    array = np.arange(8, dtype=dtype).reshape(2, 2, 2)
    for value in (array, npy(array)):
        latent = read_latent(value, shape="(2, 2, 2)")
        torch.testing.assert_close(latent, torch.from_numpy(array), rtol=0, atol=0)
    assert read_latent(array.astype(np.float64)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"the shape \(8,\); expected finite numbers of shape"):
        read_latent(array.reshape(-1))


def test_stored_values() -> None:
    assert stored_value(pa.array(["a", None]), 1) is None
    assert stored_value(pa.array([["a", "b"]]), 0, 1) == "b"
    assert stored_value(pa.array(['["a", "b"]']), 0, 1) == "b"
    assert stored_value(pa.array(['["a", "b"]']).cast(pa.json_()), 0, 1) == "b"
    numbers = stored_value(pa.chunked_array([pa.array([[[1.0, 2.0]]]), pa.array([[[3.0, 4.0]]])]), 1)
    np.testing.assert_array_equal(numbers, [[3.0, 4.0]])
    with pytest.raises(ValueError, match="holds 1 nulls"):
        stored_value(pa.array([[1.0, None]]))


class TestVideo:
    def test_a_gif_needs_no_video_library(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 255)]
        frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
        video = read_video("v.gif", tmp_path)
        assert [number(frame) for frame in video.frames()] == [0, 255]

    def test_the_missing_package_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "imageio", None)
        (tmp_path / "v.mp4").write_bytes(b"video")
        with pytest.raises(ImportError, match=r"v.mp4 needs imageio: pip install 'imageio\[ffmpeg\]'"):
            VideoFile(tmp_path / "v.mp4").frames()

    def test_missing_or_damaged_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="none.gif does not exist"):
            VideoFile(tmp_path / "none.gif").frames()
        (tmp_path / "v.gif").write_bytes(b"video")
        with pytest.raises(ValueError, match="v.gif cannot be read as a video"):
            VideoFile(tmp_path / "v.gif").frames()
        with pytest.raises(ValueError, match="stored as bytes"):
            read_video(b"video")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("[1, 4, 8, 8]", (4, 8, 8)),
        ([2, 4, 8, 8], (2, 4, 8, 8)),
        ((1, 8, 8), (1, 8, 8)),
        ([1, 1, 4, 8, 8], (1, 1, 4, 8, 8)),
    ],
)
def test_a_batch_of_one_is_cut_from_a_published_shape(shape: Any, expected: tuple[int, ...]) -> None:
    assert published_shape(shape) == expected


@pytest.mark.parametrize("shape", ["-" * 100_000 + "1", "[" * 100_000, "(1,", 3, "x"])
def test_shapes_that_are_none_are_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="no list of numbers"):
        published_shape(shape)


def test_pixels_are_no_latents() -> None:
    with pytest.raises(ValueError, match="got array of uint8"):
        read_latent(np.zeros((3, 8, 8), np.uint8))
