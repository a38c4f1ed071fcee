"""Files of `deploy/` and commands of `docs/serving.md`: settings that exist, and shapes that their readers take.

What a cluster does with them is not tested here.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi", reason="needs the serve extra")

from plait.cli import main
from plait.engines import is_address
from plait.server import ServeConfig, resolve

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
DOCS = ROOT / "docs" / "serving.md"


def printed(args: list[str]) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["serve", *args, "--print-config"])
    assert result.exit_code == 0, result.output
    return {} if "--new-key" in args else tomllib.loads(result.stdout)


def commands(text: str) -> list[list[str]]:
    """Arguments of every `plait serve` in a text, its line continued where it ends with a backslash."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [match[1] for line in lines if (match := re.search(r"(?:^|[\s/])plait serve\b([^#`|>&\n]*)", line))]
    # What stands in for a value: ${VARIABLE}, "$HOME/keys".
    return [shlex.split(args) for args in found]


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".toml"], ids=lambda path: path.name)
def test_a_file_of_settings_is_one(path: Path) -> None:
    settings = tomllib.loads(path.read_text())
    shown = printed(["--config", str(path)])
    assert {name: shown[name] for name in settings} == settings
    config = resolve({}, {}, str(path))
    if config.engine is not None:
        # Its options are ones that such an engine takes.
        assert is_address(config.engine)
        http = pytest.importorskip("plait.engines.http", reason="needs the http extra")
        assert len(http.HttpEngine(config.engine, **config.options()).urls) == len(config.engine.split(","))


@pytest.mark.parametrize("path", [*FILES, DOCS], ids=lambda path: path.name)
def test_a_command_of_ours_is_one(path: Path, tmp_path: Path) -> None:
    for args in commands(path.read_text()):
        # Files of the machine that it is for.
        args = [str(DEPLOY / "serve.toml") if arg.startswith("/etc/plait/serve.toml") else arg for arg in args]
        if "--config" in args and not Path(args[args.index("--config") + 1]).is_file():
            file = tmp_path / "serve.toml"
            file.write_text("")
            args[args.index("--config") + 1] = str(file)
        printed(args)


def test_commands_are_found_where_they_are() -> None:
    assert commands("run: plait serve --port 1 \\\n   --log off  # so\n/opt/plait/bin/plait serve") == [
        ["--port", "1", "--log", "off"],
        [],
    ]
    found = {path.name: len(commands(path.read_text())) for path in [*FILES, DOCS]}
    assert min(found[name] for name in ("plait.service", "skypilot.yaml", "serving.md")) > 0


@pytest.mark.parametrize("path", [*FILES, DOCS], ids=lambda path: path.name)
def test_variables_name_settings(path: Path) -> None:
    known = {f"PLAIT_{name.upper()}" for name in ServeConfig.__slots__} | {"PLAIT_ENGINE_KEY", "PLAIT_CONFIG"}
    known |= {"PLAIT_NAME", "PLAIT_"}
    assert set(re.findall(r"PLAIT_[A-Z_]*", path.read_text())) <= known


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "plait.service"
    text = (DEPLOY / "plait.service").read_text()
    program = shutil.which("true")
    assert "/opt/plait/bin/plait " in text
    unit.write_text(text.replace("/opt/plait/bin/plait ", f"{program} "))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=50)
    own = [line for line in done.stderr.splitlines() if "plait.service" in line]
    assert (done.returncode, own) == (0, [])


def test_time_to_stop_is_longer_than_time_to_drain() -> None:
    drain_s = tomllib.loads((DEPLOY / "serve.toml").read_text())["drain_s"]
    for name, pattern in {
        "plait.service": r"TimeoutStopSec=(\d+)",
        "kubernetes.yaml": r"terminationGracePeriodSeconds: (\d+)",
    }.items():
        found = re.search(pattern, (DEPLOY / name).read_text())
        assert found is not None
        assert float(found[1]) > drain_s + 5


def test_manifests_fit_together() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (port,) = container["ports"]
    assert port["containerPort"] == tomllib.loads((DEPLOY / "serve.toml").read_text())["port"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    probes = [container[name]["httpGet"] for name in ("livenessProbe", "readinessProbe")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [("/health", "http"), ("/ready", "http")]
    args = [str(DEPLOY / "serve.toml") if arg == "/etc/plait/serve.toml" else arg for arg in container["args"]]
    assert printed(args)["host"] == "0.0.0.0"
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    assert (task["resources"]["ports"], task["service"]["readiness_probe"]) == (8000, "/ready")


def test_the_kubernetes_objects_have_no_unknown_field() -> None:
    client = pytest.importorskip("kubernetes.client", reason="needs the kubernetes client")
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        kind = f"V1{document['kind']}"
        read = client.ApiClient()._ApiClient__deserialize(document, kind)
        again = client.ApiClient().sanitize_for_serialization(read)
        assert again == document


def test_the_ray_application_uses_what_there_is() -> None:
    tree = ast.parse((DEPLOY / "ray_serve.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("plait."):
            module = __import__(str(node.module), fromlist=["_"])
            assert all(hasattr(module, alias.name) for alias in node.names)
