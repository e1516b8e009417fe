from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dina_reward.data import Bucket, BucketRule
from dina_reward.data.buckets import PUBLISHED_BUCKETS, cover_scale, fit_image


RULE = BucketRule()
SIDES = st.integers(64, 3000)


def choose(*sizes: tuple[int, int], rule: BucketRule = RULE) -> str | None:
    position = rule.choose(*sizes)
    return None if position is None else str(rule.buckets[position])


def test_the_published_buckets() -> None:
    published = (
        "256x256 512x512 1024x1024 1248x832 1344x896 832x1248 896x1344 1024x768 768x1024 1472x832 832x1472 1152x832 "
        "832x1152"
    )
    assert " ".join(map(str, PUBLISHED_BUCKETS)) == published


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(1024, 1024), (1024, 1024)], "1024x1024"),
        ([(1024, 1024), (512, 512)], "512x512"),  # the largest that both fill
        ([(2048, 2048), (1000, 1000)], "1024x1024"),  # 2.4 % larger
        ([(900, 900), (900, 900)], "512x512"),  # 1024 would enlarge by 14 %
        ([(1216, 832), (1216, 832)], "1248x832"),  # |log| .0257, 2.6 % larger
        ([(1344, 896), (1344, 896)], "1344x896"),
        ([(1248, 832), (1344, 896)], "1248x832"),
        ([(832, 1216), (896, 1344)], "832x1248"),
        ([(1360, 1000), (1360, 1000)], "1152x832"),  # accepts 1024x768 too, which is smaller
        ([(1920, 1080), (1920, 1080)], "1472x832"),
        ([(1024, 1024), (1024, 768)], None),
        ([(200, 200), (1024, 1024)], None),  # too small for the smallest square
        ([(1280, 960), (1152, 832)], None),  # |log| .036 and .038 from the other's bucket
    ],
)
def test_choice(sizes: list[tuple[int, int]], expected: str | None) -> None:
    assert choose(*sizes) == expected
    assert choose(*reversed(sizes)) == expected


def test_equal_areas_go_by_aspect_then_by_order() -> None:
    rule = BucketRule.of(("200x100", "160x125", "125x160"), tolerance=10, max_upscale=10)
    assert choose((165, 120), (165, 120), rule=rule) == "160x125"
    assert choose((100, 100), rule=rule) == "160x125"
    assert choose((100, 100), rule=BucketRule.of(("125x160", "160x125"), tolerance=10)) is None
    assert choose((160, 160), rule=BucketRule.of(("125x160", "160x125"), tolerance=10)) == "125x160"


@given(first=st.tuples(SIDES, SIDES), second=st.tuples(SIDES, SIDES))
def test_the_choice_is_the_largest_that_both_accept(first: tuple[int, int], second: tuple[int, int]) -> None:
    accepted = [
        bucket
        for bucket in PUBLISHED_BUCKETS
        if all(
            abs(math.log(w / h) - math.log(bucket.width / bucket.height)) <= 0.03 + 1e-9
            and bucket.width <= 1.05 * w + 1e-6
            and bucket.height <= 1.05 * h + 1e-6
            for w, h in (first, second)
        )
    ]
    position = RULE.choose(first, second)
    assert (position is None) == (not accepted)
    if position is not None:
        assert PUBLISHED_BUCKETS[position] in accepted
        assert PUBLISHED_BUCKETS[position].pixels == max(bucket.pixels for bucket in accepted)


@given(size=st.tuples(SIDES, SIDES), bucket=st.sampled_from(PUBLISHED_BUCKETS))
def test_scaling_just_covers(size: tuple[int, int], bucket: Bucket) -> None:
    scale = cover_scale(size, bucket)
    width, height = scale * size[0], scale * size[1]
    assert width >= bucket.width - 1e-6
    assert height >= bucket.height - 1e-6
    assert min(width - bucket.width, height - bucket.height) == pytest.approx(0, abs=1e-6)


def test_resizing_keeps_the_middle() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = 255  # the middle 40 columns
    image = Image.fromarray(pixels)
    assert (np.asarray(fit_image(image, Bucket(40, 40))) == 255).all()
    halved = fit_image(image, Bucket(20, 20))
    assert halved.size == (20, 20)
    assert np.asarray(halved).min() > 200
    tall = fit_image(image.transpose(Image.Transpose.ROTATE_90), Bucket(40, 40))
    assert (np.asarray(tall) == 255).all()


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert (np.asarray(fit_image(Image.fromarray(pixels), Bucket(48, 32))) == pixels).all()
    assert fit_image(Image.new("L", (48, 32)), Bucket(48, 32)).mode == "RGB"


@pytest.mark.parametrize("text", ["", "12x", "x12", "a", "-3x4", "0x5", "1x2x3"])
def test_unreadable_buckets(text: str) -> None:
    with pytest.raises(ValueError, match="bucket"):
        Bucket.parse(text)


def test_parsing() -> None:
    assert Bucket.parse(" 1248 x 832 ") == Bucket(1248, 832)
    assert Bucket.parse("512") == Bucket(512, 512)
    assert BucketRule.of(()).buckets == PUBLISHED_BUCKETS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": ()}, "at least one"),
        ({"buckets": (Bucket(1, 1), Bucket(1, 1))}, "different"),
        ({"tolerance": -1}, "tolerance"),
        ({"max_upscale": 0}, "max_upscale"),
    ],
)
def test_impossible_rules(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BucketRule(**arguments)
    with pytest.raises(ValueError, match="sizes"):
        RULE.choose((0, 5))


def test_equal_ratios_are_equal_in_spite_of_rounding() -> None:
    """A product of the largest enlargement and a side is no float: 1.1 * 30 > 33 by a hair."""
    rule = BucketRule.of(("33x33",), max_upscale=33 / 30 - 1e-12)
    assert rule.accepts((30, 30), rule.buckets[0])
    assert not rule.accepts((29, 29), rule.buckets[0])
