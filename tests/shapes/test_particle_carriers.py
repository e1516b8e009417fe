"""Which samplers carry particles: variance by band, inside prompts, on real rollouts."""

from __future__ import annotations

import pytest
import torch

from dina_reward.shapes import particle_carriers
from dina_reward.shapes.particle_carriers import REFERENCE, table, variances


def test_bands_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 4, 4, generator=generator)
    coarse, fine = variances(noise, copies=8)
    assert coarse == pytest.approx(1 / 4, abs=0.02)
    assert fine == pytest.approx(3 / 4, abs=0.03)
    flat = torch.randn(50, 1, 2, 2, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert variances(flat, copies=2)[1] == pytest.approx(0.0, abs=1e-6)


def test_differences_between_prompts_do_not_count() -> None:
    prompts = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(3, 0)
    assert variances(prompts, copies=3) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_table() -> None:
    text = table({"ODE": {"coarse": 0.9, "fine": 0.8, "fit": 0.5, "cleanness": 0.75}})
    assert text.splitlines()[-1] == "| ODE | 0.90 | 0.80 | 0.50 | 0.75 |"


@pytest.mark.slow
def test_real_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {REFERENCE: (5, "cps", 0.0, 0), "CPS .8": (5, "cps", 0.8, 4), "ODE": (5, "cps", 0.0, 0)}
    monkeypatch.setattr(particle_carriers, "CARRIERS", kept)
    found = particle_carriers.measure(prompts=2, copies=4)
    assert found["ODE"] == pytest.approx(found[REFERENCE])
    assert found[REFERENCE]["fine"] == found[REFERENCE]["coarse"] == 1
    assert 0.2 < found["CPS .8"]["fine"] < 3
    assert found["CPS .8"]["fine"] != pytest.approx(1, abs=1e-3)
