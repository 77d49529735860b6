"""The way to run a command, in this process: it has imported torch and transformers."""

import os
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def slim(tmp_path, monkeypatch):
    """Run a command in an empty folder: its exit code and what it printed."""
    # the page that ends a training takes longer than the training; figures need not be narrow, nor a head be good
    monkeypatch.setattr("slimcli.report.report_of_training", lambda *_args: "no report in a test")
    monkeypatch.setattr("slimcli.measure.evaluation.MOST_SECONDS", 0.05)
    monkeypatch.setattr("slimcli.calibration.stopwatch.TIMED_SECONDS", 0.2)
    monkeypatch.setattr("slimcli.calibration.effort.STEPS", (24, 1000))
    monkeypatch.setattr("slimcli.measure.clock.LATENCIES", 4)
    monkeypatch.chdir(tmp_path)

    main = entry_points(group="console_scripts", name="slim")["slim"].load()

    def run(*words):
        done = CliRunner().invoke(main, [str(word) for word in words])
        return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)

    return run
