"""What pip makes of this repository: wheels that work where the repository is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {".": "slimcli", **{f"plugins/{path.name}": path.name for path in sorted((ROOT / "plugins").glob("slim-*"))}}


def build(source: Path, to: Path) -> Path:
    """Build the sdist, and from it the wheel, as a release does; return the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(to), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(to.glob("*.tar.gz"))) == 1
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds slim as its wheel installs it."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build(ROOT, folder / "dist")) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def slim(installed: Path, folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    # the figures need not be narrow here
    code = f"""
import slimcli
assert slimcli.__file__.startswith({str(installed)!r})
from slimcli.cli import main
if {words[0]!r} == "eval":
    from slimcli.measure import evaluation
    evaluation.MOST_SECONDS = 0.05
main()
"""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_types_recipes_templates_and_the_embedded_model(installed: Path) -> None:
    for name in (
        "py.typed",
        "recipes/quickstart.toml",
        "report/report.html.jinja",
        "assets/digits_vit/model.safetensors",
    ):
        assert list((installed / "slimcli").rglob(Path(name).name)), name


def test_commands_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "Speed-up" in slim(installed, tmp_path, "eval", "--limit", "16")
    assert "quickstart" in slim(installed, tmp_path, "recipes")
    slim(installed, tmp_path, "plugins", "new", "mine")
    assert (tmp_path / "slim-mine" / "slim_mine" / "backbone.py").is_file()


@pytest.mark.parametrize("folder", [name for name in PACKAGES if name != "."])
def test_every_plugin_builds(folder: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(ROOT / folder, tmp_path)) as wheel:
        names = wheel.namelist()
    module = PACKAGES[folder].replace("-", "_")
    assert f"{module}/__init__.py" in names
    assert any("entry_points.txt" in name for name in names)
