"""Which samplers carry particles: the bands, and that a full CPS rollout loses variance which a window does not."""

from __future__ import annotations

import pytest
import torch

from dina_reward.shapes import particle_carriers
from dina_reward.shapes.particle_carriers import CARRIERS, REFERENCE, table, variances


def test_bands_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 4, 4, generator=generator)
    coarse, fine = variances(noise)
    assert coarse == pytest.approx(1 / 4, abs=0.02)
    assert fine == pytest.approx(3 / 4, abs=0.03)
    flat = torch.randn(50, 1, 2, 2, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert variances(flat)[1] == pytest.approx(0.0, abs=1e-6)


def test_table() -> None:
    text = table({"ODE": {"coarse": 0.9, "fine": 0.8, "fit": 0.5, "cleanness": 0.75}})
    assert text.splitlines()[-1] == "| ODE | 0.90 | 0.80 | 0.50 | 0.75 |"


@pytest.mark.slow
def test_cps_in_full_loses_fine_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: CARRIERS[name] for name in (REFERENCE, "CPS .8 in the first third", "CPS .8")}
    kept[REFERENCE] = (10, "cps", 0.0, 0)
    monkeypatch.setattr(particle_carriers, "CARRIERS", kept)
    found = particle_carriers.measure(prompts=48)
    assert found[REFERENCE]["fine"] == found[REFERENCE]["coarse"] == 1
    assert found["CPS .8"]["fine"] < found["CPS .8 in the first third"]["fine"] - 0.05
