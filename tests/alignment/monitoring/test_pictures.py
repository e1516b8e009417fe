from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dina_reward.alignment.monitoring import pictures
from dina_reward.alignment.monitoring.pictures import (
    GRID_GAP,
    grid_tiles,
    log_pictures,
    picture_grid,
    save_picture,
    wrap_text,
)


RED, GREEN, BLUE = torch.eye(3)[:, :, None, None].expand(3, 3, 32, 32)
FONT = ImageFont.load_default()


def dark_pixels(image: Image.Image) -> int:
    return int((np.asarray(image.convert("L")) < 100).sum())


def test_grid_without_captions():
    grid = picture_grid([RED] * 5)
    assert grid.size == (3 * 100 + 4, 2 * 100 + 4)
    assert grid.getpixel((10, 10)) == (255, 0, 0)
    assert grid.getpixel((210, 110)) == (255, 255, 255)
    assert picture_grid([RED], min_side=32).size == (40, 40)
    tall = picture_grid([RED[:, :, :8].repeat(1, 2, 1)])
    assert tall.size == (2 * 8 + 8, 2 * 64 + 8)


def test_prompts_and_scores_are_written_under_the_images():
    images = [RED, GREEN, BLUE]
    plain = picture_grid(images)
    named = picture_grid(images, ["a cat", "a very long prompt that needs several lines to fit under it", ""])
    scored = picture_grid(images, ["a cat", "a dog", "a bird"], [0.5, float("nan"), 2.0])
    assert plain.width == named.width == scored.width
    assert plain.height < scored.height < named.height
    band = (GRID_GAP, GRID_GAP + 96, GRID_GAP + 96, GRID_GAP + 96 + 12)
    assert dark_pixels(named.crop(band)) > 20
    assert dark_pixels(scored.crop(band)) > 20
    second_line = (GRID_GAP, GRID_GAP + 96 + 14, GRID_GAP + 96, GRID_GAP + 96 + 24)
    assert dark_pixels(named.crop(second_line)) == 0  # "a cat" fits into one
    assert dark_pixels(scored.crop(second_line)) > 10
    only_scores = picture_grid(images, scores=[0.5, 1.0, 2.0])
    assert plain.height < only_scores.height < scored.height
    with pytest.raises(ValueError, match="got 2 prompts for 3 images"):
        picture_grid(images, ["a", "b"])
    with pytest.raises(ValueError, match="got 0 scores for 3 images"):
        picture_grid(images, scores=[])
    with pytest.raises(ValueError, match="no images"):
        picture_grid([])


def test_white_images_have_an_edge():
    white = torch.ones(3, 32, 32)
    grid = np.asarray(picture_grid([white, white]).convert("L"))
    assert (grid[GRID_GAP + 10, [GRID_GAP - 1, GRID_GAP + 96, 2 * GRID_GAP + 95, 2 * GRID_GAP + 192]] < 250).all()
    assert (grid[[GRID_GAP - 1, GRID_GAP + 96], GRID_GAP + 10] < 250).all()
    assert (grid[GRID_GAP : GRID_GAP + 96, GRID_GAP : GRID_GAP + 96] == 255).all()


def test_numbers_under_the_images_are_named(monkeypatch):
    written = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", lambda pen, place, text, **style: written.append(text))
    picture_grid([RED, GREEN], ["a cat", "a dog"], [0.51234, float("nan")])
    picture_grid([BLUE], scores=[2.0], score_name="fit")
    assert written == ["a cat", "reward 0.5123", "a dog", "no reward", "fit 2"]


@pytest.mark.parametrize("prompts", [None, ["one", "two, which is longer than a line of text", "three"]])
def test_tiles_come_back_without_captions(prompts):
    grid = picture_grid([RED, GREEN, BLUE], prompts)
    tiles = grid_tiles(grid, 3)
    for tile, color in zip(tiles, ("red", "lime", "blue"), strict=True):
        assert np.array_equal(np.asarray(tile), np.asarray(Image.new("RGB", (96, 96), color)))
    assert len(grid_tiles(grid, 3, 2)) == 2


def test_text_is_wrapped_and_cut():
    lines = wrap_text("a large red circle on a white background", FONT, 80)
    assert " ".join(lines) == "a large red circle on a white background"
    assert len(lines) > 1
    assert all(FONT.getlength(line) <= 80 for line in lines)
    letters = wrap_text("x" * 60, FONT, 100)
    assert "".join(letters) == "x" * 60
    assert all(FONT.getlength(line) <= 100 for line in letters)
    cut = wrap_text("word " * 100, FONT, 80)
    assert len(cut) == 4
    assert cut[-1].endswith("...")
    assert FONT.getlength(cut[-1]) <= 80
    assert wrap_text("", FONT, 80) == []


def test_fonts_without_freetype_take_any_prompt(monkeypatch):
    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr(pictures, "_font", lambda size: bitmap)
    assert picture_grid([RED], ["红色的圆 é"]).height > 104


def test_pictures_are_written_whole(tmp_path):
    save_picture(picture_grid([RED]), tmp_path / "deep" / "a.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "deep" / "a.png") as picture:
        assert picture.getpixel((10, 10)) == (255, 0, 0)


class Writer:
    def __init__(self):
        self.calls = []

    def add_image(self, tag, array, global_step, dataformats):
        self.calls.append((tag, array.shape, global_step, dataformats))

    def add_text(self, tag, text, global_step):
        self.calls.append((tag, text, global_step))


class Tracker:
    """Stands for the modules wandb and trackio."""

    def __init__(self, run="run"):
        self.run = run
        self.logged = []

    def Image(self, picture, caption):
        return (picture.size, caption)

    def log(self, values):
        self.logged.append(values)


def test_pictures_go_to_the_trackers_that_run(caplog):
    picture, writer, wandb, trackio = picture_grid([RED]), Writer(), Tracker(), Tracker()
    callbacks = [
        object(),
        SimpleNamespace(tb_writer=writer),
        SimpleNamespace(_wandb=wandb),
        SimpleNamespace(_trackio=trackio, _initialized=True),
    ]
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))
    assert log_pictures(trainer, 20, picture, "step 20") == ["tensorboard", "wandb", "trackio"]
    size = (picture.height, picture.width, 3)
    assert writer.calls == [("eval/samples", size, 20, "HWC"), ("eval/samples/caption", "step 20", 20)]
    expected = {"eval/samples": (picture.size, "step 20"), "train/global_step": 20}
    assert wandb.logged == [expected]
    assert trackio.logged == [expected]
    assert log_pictures(callbacks[1:2], 30, picture, name="other") == ["tensorboard"]
    assert writer.calls[2:] == [("other", size, 30, "HWC")]


def test_trackers_that_have_not_started_are_passed_over():
    idle = [
        SimpleNamespace(tb_writer=None),
        SimpleNamespace(_wandb=Tracker(run=None)),
        SimpleNamespace(_wandb=None),
        SimpleNamespace(_trackio=Tracker(), _initialized=False),
    ]
    assert log_pictures(idle, 1, picture_grid([RED])) == []
    assert idle[1]._wandb.logged == []
    assert idle[3]._trackio.logged == []


def test_a_failing_tracker_is_only_warned_about(caplog):
    class Offline(Tracker):
        def log(self, values):
            raise OSError("no network")

    working = Tracker()
    callbacks = [SimpleNamespace(_wandb=Offline()), SimpleNamespace(_wandb=working)]
    with caplog.at_level(logging.WARNING):
        assert log_pictures(callbacks, 5, picture_grid([RED])) == ["wandb"]
    assert len(working.logged) == 1
    assert "wandb did not take the picture of step 5: OSError: no network" in caplog.text


def test_real_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from transformers.integrations import TensorBoardCallback

    writer = tensorboard.SummaryWriter(str(tmp_path))
    assert log_pictures([TensorBoardCallback(writer)], 3, picture_grid([RED])) == ["tensorboard"]
    writer.close()
    assert any(path.stat().st_size > 100 for path in tmp_path.iterdir())
