"""The benchmark programs run, and say what they should; how fast anything is, no test asks."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(folder, name, *words):
    """Run a program as `python benchmarks/NAME.py` does, in this process, which has imported torch."""
    program, out, err, code = BENCHMARKS / f"{name}.py", io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(program), *map(str, words)])
        patch.syspath_prepend(str(BENCHMARKS))
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
    return subprocess.CompletedProcess([name, *words], code, out.getvalue(), err.getvalue())


def quick(folder, name, *words):
    """Rows of a program's quick run; its table must show them."""
    done = run(folder, name, "--quick", "--device", "cpu", "--json", "found.json", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((folder / "found.json").read_text())
    assert document["environment"]["threads"] == 1
    assert f"1 threads; python {sys.version.split()[0]}" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == len(document["rows"]) + 1
    names = [row["name"] for row in document["rows"]]
    assert len(set(names)) == len(names)
    for key in document["compared"]:
        assert any(key in row for row in document["rows"])
    return document["rows"]


def test_memory(tmp_path):
    rows = quick(tmp_path, "memory")
    assert len(rows) == 5 and all(row["plain_ms"] >= 0 < row["faster"] for row in rows)


def test_inference(tmp_path):
    rows = quick(
        tmp_path, "inference", "--keep-rates", "0.5", "--exact-rates", "0.5", "--precisions", "float32,bfloat16"
    )
    assert [(row["precision"], row["batch"], row["row"]) for row in rows] == [
        (precision, batch, row)
        for precision in ("float32", "bfloat16")
        for batch in (1, 2)
        for row in ("dense", "0.5", "dense, exact", "0.5, exact", "0.5, heirs")
    ]
    for dense, *others in (rows[i : i + 5] for i in range(0, 20, 5)):
        assert dense["realised"] == 1
        assert all(row["gmacs"] < dense["gmacs"] for row in others)
        assert all(row["goal"]["met"] == (row["realised"] >= row["goal"]["at_least"]) for row in others)


def test_training(tmp_path):
    rows = quick(tmp_path, "training")
    assert rows[0]["speed"] == rows[0]["memory"] == 1
    # memory is no timing: the life head alone needs less than a whole backbone
    assert rows[1]["memory_goal"]["met"]


def test_growth(tmp_path):
    rows = quick(tmp_path, "growth", "--plot", "plot.png")
    assert {row["sweep"] for row in rows} == {"batch size", "image size", "depth"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_resolution(tmp_path):
    rows = quick(tmp_path, "resolution", "--plot", "plot.png")
    assert [row["size"] for row in rows] == [32, 32, 48, 48, 64, 64]
    for dense, slim in zip(rows[::2], rows[1::2], strict=True):
        assert dense["row"] == "dense" and dense["gmacs"] > slim["gmacs"]
        # images of the same model: a larger one is compared with the dense model at its own size
        assert ("agreement" in slim) == ("similarity" not in slim) == ("neighbours" not in slim)
    assert rows[2]["gmacs"] > 2 * rows[0]["gmacs"] and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_compiled(tmp_path):
    rows = quick(tmp_path, "compiled")
    assert [row["row"] for row in rows] == ["dense", "0.5", "dense, exact", "0.7, exact", "0.7, heirs"]


def test_packing(tmp_path):
    rows = quick(tmp_path, "packing")
    assert [row["row"] for row in rows] == ["dense", "0.7", "0.5"] * 2
    assert all(row["faster"] > 0 for row in rows)


def test_ablations(tmp_path):
    tables = ("--tables", "dense,stages,life layer", "--seeds", "0,1")
    rows = quick(tmp_path, "ablations", *tables)
    assert [row["variant"] for row in rows[:4]] == [
        "given the same epochs",
        "the life head alone",
        "one stage of both",
        "two stages",
    ]
    assert rows[0]["gmacs"] > rows[1]["gmacs"]
    # a fall costs as much as the recipe's three drops, to a patch
    assert all(abs(row["gmacs"] / rows[1]["gmacs"] - 1) < 0.05 for row in rows[1:])
    finished = (tmp_path / "runs" / "ablations" / "finished.json").read_text()
    assert quick(tmp_path, "ablations", *tables) == rows
    assert (tmp_path / "runs" / "ablations" / "finished.json").read_text() == finished


def test_operators(tmp_path):
    rows = quick(tmp_path, "operators", "--top", "5", "--exact-savings")
    assert rows[0]["name"] == "all"
    assert len(rows) == 6
    assert sum(row["dense_ms"] for row in rows[1:]) <= rows[0]["dense_ms"] + 0.01


def test_gpu(tmp_path):
    done = run(tmp_path, "gpu", "--quick", "--device", "cpu", "--json", "found.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed" not in done.stdout, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["runtime"] for row in found["rows"]} == {"eager", "compile"}
    assert {row["method"] for row in found["rows"]} == {"dense", "discard", "heirs", "calibrated", "tome", "evit"}
    assert all(row["kernels"] for row in found["rows"] if row["runtime"] == "eager")
    assert len(found["training"]) == 5 and found["attention"] and len(found["plans"]) == 2
    assert "tiny: compiled again for 2, 3 images: 0 times" in found["notes"]
    # nothing begins that there is no time for
    done = run(tmp_path, "gpu", "--quick", "--device", "cpu", "--minutes", "0.03", "--json", "found.json")
    assert "left out, for want of time: compile" in done.stdout


def test_startup(tmp_path):
    assert quick(tmp_path, "startup")[0]["runs"] == 2


def test_loading(tmp_path):
    rows = quick(tmp_path, "loading")
    assert {row["row"] for row in rows} == {"JPEG files", "cache"}
    assert all(0 <= row["waited"] <= 1 for row in rows)


def result(path, **realised):
    rows = [{"name": name, "realised": value} for name, value in realised.items()]
    facts = {"device_name": "a processor", "threads": 2}
    document = {"benchmark": "Inference", "environment": facts, "compared": {"realised": "higher"}, "rows": rows}
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("new", "code", "word"),
    [
        ({"a": 1.0, "b": 0.96}, 0, "0 worse"),
        ({"a": 1.2, "b": 1.0}, 0, "better"),
        ({"a": 1.0, "b": 0.94}, 1, "WORSE"),
        ({"a": 1.0}, 1, "GONE"),
    ],
)
def test_a_regression_is_an_exit_code(tmp_path, new, code, word):
    old, new = result(tmp_path / "old.json", a=1.0, b=1.0), result(tmp_path / "new.json", **new)
    done = run(tmp_path, "compare", old, new)
    assert done.returncode == code, done.stderr
    assert word in done.stdout


def test_what_cannot_be_compared_is_refused(tmp_path):
    old = result(tmp_path / "old.json", a=1.0)
    (tmp_path / "new.json").write_text("{}")
    done = run(tmp_path, "compare", old, tmp_path / "new.json")
    assert done.returncode == 2
    assert "is not what a benchmark wrote" in done.stderr
