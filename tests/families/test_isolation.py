"""Everything that is specific to a model is in its family's file, and the file stays small."""

from __future__ import annotations

import re
from pathlib import Path

import dina_reward
from dina_reward.families import families


PACKAGE = Path(dina_reward.__file__).parent
ROOT = PACKAGE.parent


def test_no_family_is_named_outside_its_directory() -> None:
    names = re.compile(rf"\b({'|'.join(family.name for family in families())})\b")
    sources = [path for path in PACKAGE.rglob("*.py") if "families" not in path.parts]
    sources += [*ROOT.glob("recipes/*.py"), *ROOT.glob("examples/*.py")]
    assert len(sources) > 100
    found = {
        str(path.relative_to(ROOT)): names.findall(text)
        for path in sources
        if names.search(text := path.read_text(encoding="utf-8"))
    }
    assert found == {}


def test_family_files_stay_under_250_lines() -> None:
    lengths = {
        family.name: len((PACKAGE / "families" / f"{family.name}.py").read_text(encoding="utf-8").splitlines())
        for family in families()
        if type(family).__module__.startswith("dina_reward.")
    }
    assert len(lengths) >= 9
    assert {name: length for name, length in lengths.items() if length >= 250} == {}
