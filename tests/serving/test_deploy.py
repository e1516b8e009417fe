"""The files for containers start the command with options that it has, and probes that it answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_commands import check_dina_reward


DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


def instruction(name: str) -> list[str]:
    """The arguments of an instruction of the Dockerfile in JSON."""
    (line,) = (line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith(f"{name} "))
    return list(json.loads(line.removeprefix(name)))


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_image_starts_the_command() -> None:
    entry, command = instruction("ENTRYPOINT"), instruction("CMD")
    assert entry[0] == "dina-reward"
    check_dina_reward([*entry[1:], *command])


def test_the_manifest_fits_the_image_and_the_server(manifest: dict[str, Any]) -> None:
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_dina_reward([*instruction("ENTRYPOINT")[1:], *container["args"]])
    options = dict(argument.removeprefix("--").split("=") for argument in container["args"])
    seconds = float(options["drain-seconds"]) + float(options["shutdown-timeout"])
    assert pod["terminationGracePeriodSeconds"] > seconds
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/livez"
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < float(options["drain-seconds"])
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Service"]["spec"]["selector"] == labels
    assert str(container["ports"][0]["containerPort"]) == instruction("ENTRYPOINT")[-1]
