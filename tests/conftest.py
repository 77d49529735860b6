"""Small models, small data, and the way to run a command."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# kernels for a GPU are interpreted where there is none; Triton, which timm imports, looks at it once
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import nn

from slimcli import report, train  # noqa: F401
from slimcli.backbones.timm_families import small_models
from slimcli.calibration import effort, stopwatch
from slimcli.cli import main
from slimcli.measure import clock, evaluation
from slimcli.plugins import find_backbone

# tests run side by side: one thread each is faster than two that compete
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# the figures need not be narrow here
evaluation.MOST_SECONDS, stopwatch.TIMED_SECONDS, clock.LATENCIES = 0.05, 0.2, 4
# nor a life head that is fitted on a few images be good
effort.STEPS = (24, 1000)
# nothing that a test writes has to survive a power failure
os.fsync = lambda _file: None  # type: ignore[assignment]
# the page that ends a training takes longer than the training; tests of the page have `reports` or `REPORT`
REPORT = report.report_of_training
report.report_of_training = lambda folder, *_args, **_options: f"{folder}: no report in this test"


_modules_at_freeze = 0


def freeze() -> None:
    """Each stage of a training collects garbage, and need not look through all that was imported."""
    global _modules_at_freeze
    if len(sys.modules) > _modules_at_freeze + 100:
        gc.collect()
        gc.freeze()
        _modules_at_freeze = len(sys.modules)


def pytest_collection_finish() -> None:
    freeze()


def pytest_runtest_teardown() -> None:
    freeze()


# the same examples each time, so that nobody's change fails for a reason that is not its own; `long` looks for new ones
slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=slow)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=slow)
settings.load_profile("quick")

SHARED = Path(__file__).parent.parent.parent / "shared"

TINY_RECIPE = """
name = "tiny"

[model]
name = "vit_tiny_patch16_224"
args = { img_size = 32, patch_size = 8, embed_dim = 32, depth = 4, num_heads = 2 }

[data]
name = "digits"
batch_size = 16
train_limit = 64
val_limit = 32
workers = 0

[slimming]
life_layer = 1
drop_layers = [1, 2, 3]

[[stages]]
learns = "life"
mode = "soft"
lr = 1e-3

[[stages]]
learns = "backbone"
mode = "soft"
epochs = 2
lr = 1e-3

[augmentation]
scale = [0.7, 1.0]
hflip = 0.0
"""


def tiny_vit(**changes: Any) -> nn.Module:
    """A random ViT of 4 blocks with 4 x 4 patches, in evaluation mode."""
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **{**args, **changes}).eval()
    # timm's initial weights give logits near zero, which would agree whatever is dropped
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None or shutil.which("chromedriver") is None:
        pytest.skip("Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-quic"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture
def slim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an empty folder, as `slim("eval", "--limit", 10)`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    return run


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training ends with its report, as it does for users."""
    monkeypatch.setattr(report, "report_of_training", REPORT)


@cache
def families() -> list[str]:
    """timm's families of which no earlier one has the same adapter and the same kinds of modules."""
    first: dict[frozenset[type], str] = {}
    for name, build in small_models().items():
        model = build()
        first.setdefault(frozenset({type(find_backbone(model, "timm"))} | {type(m) for m in model.modules()}), name)
    return list(first.values())


@pytest.fixture
def refused(slim: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that must be refused: one line on stderr, exit code 2, no traceback. Returns the line."""

    def run(*words: Any) -> str:
        result = slim(*words)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning:")]
        assert len(lines) == 1, result.stderr
        return lines[0]

    return run


def document(result: Result) -> dict[str, Any]:
    """The JSON document that a command printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of small JPEGs in two classes, split into train and val."""
    root = tmp_path / "photographs"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 6)):
        for number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 128, (24, 32, 3), generator=generator, dtype=torch.uint8) + 100 * number
                Image.fromarray(noise.numpy()).save(folder / f"{index}.jpg")
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and photographs; tests that need them are skipped where they are not."""
    if not (SHARED / "weights").is_dir():
        pytest.skip("the real weights and photographs (../shared) are not here")
    return SHARED
