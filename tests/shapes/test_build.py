import pytest

from dina_reward.shapes import build as build_module
from dina_reward.shapes import weights_dir
from dina_reward.shapes.build import STAGES, build


@pytest.fixture
def calls(monkeypatch):
    """Replaces every stage by one that only makes its directory, and lists which ran."""
    ran = []

    def fake(name, directory):
        def stage(output, seed):
            ran.append((name, seed))
            (output / directory).mkdir(parents=True)

        return stage, directory

    monkeypatch.setattr(
        build_module, "STAGES", {name: fake(name, directory) for name, (_, directory) in STAGES.items()}
    )
    return ran


def test_stages_run_in_order_whatever_the_order_of_their_names(calls, tmp_path):
    build(tmp_path, ["generator", "vae"], seed=3)
    assert calls == [("vae", 3), ("generator", 3)]
    assert [directory for _, directory in STAGES.values()] == [
        *("vae", "flow", "flow-aligned", "flow-preferences", "flow-reward"),
        *("ddpm", "ddpm-aligned", "ddpm-preferences", "ddpm-reward"),
    ]


def test_finished_stages_are_kept(calls, tmp_path, capsys):
    build(tmp_path, ["vae"])
    build(tmp_path, ["vae", "generator"])
    assert [name for name, _ in calls] == ["vae", "generator"]
    assert "is there already" in capsys.readouterr().out


def test_force_makes_only_the_named_stages_anew(calls, tmp_path):
    build(tmp_path, ["vae", "generator"])
    (tmp_path / "flow").rmdir()
    build(tmp_path, ["generator"], force=True)
    assert [name for name, _ in calls] == ["vae", "generator", "generator"]


def test_unknown_stages_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown stages decoder; expected some of vae, generator"):
        build(tmp_path, ["decoder"])


def test_configurations_forget_where_models_came_from(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"a": 1, "_name_or_path": "/somewhere"}')
    (tmp_path / "list.json").write_text("[1]")
    build_module.forget_origin(tmp_path)
    assert (tmp_path / "vae" / "config.json").read_text() == '{\n  "a": 1\n}\n'
    assert (tmp_path / "list.json").read_text() == "[1]"


def test_shipped_configurations_name_no_path():
    root = weights_dir("flow").parent
    assert not [path for path in root.rglob("*.json") if '"_name_or_path"' in path.read_text()]
