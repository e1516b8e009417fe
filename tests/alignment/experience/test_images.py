"""What rewards and judges may look at."""

import pytest
import torch

from dina_reward.alignment.experience.images import checked_images


def test_images_are_checked():
    images = torch.eye(3)[:2, :, None, None].expand(2, 3, 32, 32)
    assert checked_images(images.bfloat16(), 2).dtype == torch.float32
    with pytest.raises(ValueError, match=r"shape \(2, 3, 32, 32\); expected \(3, 3, height, width\)"):
        checked_images(images, 3)
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]; expected \[0, 1\]"):
        checked_images(2 * images - 1, 2)
    with pytest.raises(ValueError, match="NaN: run the VAE"):
        checked_images(images * torch.nan, 2)
