"""`import dina_reward` is cheap and its public names are complete."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dina_reward


HEAVY = ("torch", "diffusers", "transformers", "peft", "trl", "datasets", "numpy", "matplotlib")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy_and_is_fast() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import dina_reward; "
        "print(time.perf_counter() - start, *[m for m in sys.argv[1:] if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True).stdout
    seconds, *loaded = output.split()
    assert loaded == []
    assert float(seconds) < 0.3


def test_shapes_import_loads_nothing_heavy() -> None:
    assert run_python("import sys, dina_reward.shapes; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", [name for name in dina_reward.__all__ if name != "__version__"])
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(dina_reward, name).__name__ == name
    assert name in dir(dina_reward)


@pytest.mark.parametrize(
    "package", [module.name for module in pkgutil.iter_modules(dina_reward.__path__) if module.ispkg]
)
def test_every_public_name_of_a_package_resolves(package: str) -> None:
    module = importlib.import_module(f"dina_reward.{package}")
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LatentRewards'"):
        dina_reward.LatentRewards  # noqa: B018


LAZY_PACKAGE = """
from typing import TYPE_CHECKING
from dina_reward.lazy import lazy_exports

if TYPE_CHECKING:
    from lazy_package.parts import {names}

__getattr__, __dir__, __all__ = lazy_exports(__name__)
"""


@pytest.fixture
def lazy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "lazy_package").mkdir()
    (tmp_path / "lazy_package" / "parts.py").write_text("wheel = 'round'\nparts = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "lazy_package" / "__init__.py"
    for name in ("lazy_package", "lazy_package.parts"):
        sys.modules.pop(name, None)


def test_names_listed_for_type_checkers_load_on_first_use(lazy_package: Path) -> None:
    lazy_package.write_text(LAZY_PACKAGE.format(names="wheel"))
    module = importlib.import_module("lazy_package")
    assert module.__all__ == ["wheel"]
    assert "lazy_package.parts" not in sys.modules
    assert module.wheel == "round"
    assert vars(module)["wheel"] == "round"


def test_exporting_the_name_of_a_sub_module_is_refused(lazy_package: Path) -> None:
    lazy_package.write_text(LAZY_PACKAGE.format(names="wheel, parts"))
    with pytest.raises(ValueError, match=r"exports names of its own sub-modules: \['parts'\]"):
        importlib.import_module("lazy_package")
