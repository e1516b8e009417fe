"""The page about a search and its grid."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dina_reward.search import result_grid, search, write_page
from dina_reward.search.report import above_prompt_mean, cost_lines
from tests.search.helpers import TINY, closeness, tiny


def test_page_and_grid(tmp_path: Path) -> None:
    result = search(tiny()[0], closeness, ["a cat", "a dog"], method="halving", budget=2, checks=(0.4,), **TINY)
    write_page(result, tmp_path / "new" / "page.png")
    page = Image.open(tmp_path / "new" / "page.png")
    assert page.size == (1300, 650)
    assert len(page.convert("RGB").getcolors(100_000) or []) > 50
    assert result_grid(result).size[0] > 2 * 96
    lines = dict(cost_lines(result))
    assert lines["method"] == "Halving"
    assert lines["denoiser calls"].startswith(f"{result.denoiser_calls:,} (")
    assert result.decoder_calls == 2
    check = result.trace[0]
    values = torch.tensor(above_prompt_mean(check)).view(2, -1)
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
