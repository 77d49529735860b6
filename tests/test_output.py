"""Where results are written: refused before the work if it cannot be, and found again on any file system."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from slimcli import files
from slimcli.errors import SlimError
from slimcli.store import run_folder


def make_run(output: Path, name: str) -> Path:
    folder = output / name
    folder.mkdir(parents=True)
    (folder / run_folder.RECIPE).write_text("")
    return folder


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["calibrate", "-o", "file/below"], "file is a file, not a folder"),
        (["calibrate", "-o", "file"], "file: is a file: expected the name of a folder"),
        (["calibrate", "-o", "x" * 300], "name too long"),
        (["prune", "-o", "file", "--force"], "file: is a file: expected the name of a folder"),
        (["show", "-o", "file/lives.png"], "file is a file, not a folder"),
        (["show", "-o", "folder", "--format", "png"], "folder: is a folder: expected the name of a file"),
        (["report", "-o", "file/page.html"], "file is a file, not a folder"),
        (["compare", "quickstart", "-o", "file/below"], "file is a file, not a folder"),
        (["train", "quickstart", "--set", "output=file/runs"], "file is a file, not a folder"),
        (["train", "quickstart", "--dry-run", "--set", "output=file/runs"], "file is a file, not a folder"),
        (["recipes", "quickstart", "--copy", "file/mine.toml"], "file is a file, not a folder"),
        (["plugins", "new", "my-vit", "--to", "file/below"], "file is a file, not a folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(refused, tmp_path, words, what):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert what in refused(*words)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_without_permission_and_a_read_only_file_system_are_found_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SlimError, match="does not allow you to write in it"):
        files.check_writable(tmp_path / "runs" / "mine", "folder")


def test_asking_whether_a_place_can_be_written_makes_nothing(tmp_path):
    for kind in ("file", "folder"):
        files.check_writable(tmp_path / "a" / "b" / "c", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_the_longest_name_is_written(tmp_path):
    path = tmp_path / ("é" * 120 + ".html")
    files.write_file(path, b"content")
    assert path.read_bytes() == b"content"


def test_a_link_is_followed_and_a_pipe_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to("real")
    files.write_file(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"content"
    files.write_file(Path(os.devnull), b"content")
    assert not Path(os.devnull).is_file()


def test_a_disk_that_fills_in_torchs_own_writer_is_named_and_the_old_file_kept(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    files.write_file(path, b"old")
    real = files._Guarded.write

    def full(self, content):
        self.error = self.error or OSError(errno.ENOSPC, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(files._Guarded, "write", full)
    with pytest.raises(SlimError, match="no space left on the disk"):
        files.write_file(path, lambda file: torch.save({"weights": torch.zeros(1000)}, file))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_rights_is_written_to(tmp_path, monkeypatch):
    def unsupported(*_args, **_options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", unsupported)
    files.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_the_latest_run_is_what_the_link_points_at(tmp_path):
    older, newer = make_run(tmp_path, "a-20260101-000000"), make_run(tmp_path, "b-20260102-000000")
    assert run_folder.point_latest(older) is None
    assert run_folder.latest_run(tmp_path) == older
    assert run_folder.point_latest(newer) is None
    assert run_folder.latest_run(tmp_path) == newer


def test_without_links_a_text_file_names_the_latest_run(tmp_path, monkeypatch):
    def unsupported(*_args, **_options):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    older, newer = make_run(tmp_path, "a-20260101-000000"), make_run(tmp_path, "b-20260102-000000")
    assert run_folder.point_latest(older) is None
    with monkeypatch.context() as patched:
        patched.setattr(os, "symlink", unsupported)
        patched.setattr(Path, "symlink_to", unsupported)
        assert "Operation not supported" in run_folder.point_latest(newer)
    assert run_folder.latest_run(tmp_path) == newer
    assert run_folder.find_run(tmp_path / "latest") == newer
    assert run_folder.point_latest(older) is None
    assert run_folder.latest_run(tmp_path) == older


def test_a_link_copied_as_a_folder_is_left_alone_and_the_newest_run_is_found(tmp_path):
    newest = make_run(tmp_path, "b-20260103-000000")
    older = make_run(tmp_path, "c-20260101-000000")
    shutil.copytree(older, tmp_path / "latest")
    assert run_folder.latest_run(tmp_path) == run_folder.find_run(tmp_path / "latest") == newest
    assert "folder of that name" in run_folder.point_latest(older)
    assert (tmp_path / "latest" / run_folder.RECIPE).is_file()
    assert run_folder.latest_run(tmp_path) == older


def test_a_checkout_that_leaves_the_links_text_in_a_file(tmp_path):
    run = make_run(tmp_path, "a-20260101-000000")
    make_run(tmp_path, "b-20260103-000000")
    (tmp_path / "latest").write_text(run.name)
    assert run_folder.latest_run(tmp_path) == run_folder.find_run(tmp_path / "latest") == run


def test_there_is_no_latest_run_where_there_are_no_runs(tmp_path):
    (tmp_path / "notes").mkdir()
    assert run_folder.latest_run(tmp_path) is None
    assert run_folder.latest_run(tmp_path / "nowhere") is None
