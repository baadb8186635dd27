"""Files are whole or not there, and one run at a time writes in its folder."""

import contextlib
import errno
import os
import shutil
import stat
import zipfile
from types import SimpleNamespace

import pytest
from helpers import flags, run_tiny

from training.config import RunError
from training.files import RunFolder, atomic_write, check_archive, exclusive, open_run_folder


def failing(error_number, only=lambda *_: True, otherwise=None):
    """Return a function of the operating system that fails, where `only` says so."""

    def function(*arguments, **options):
        if only(*arguments):
            raise OSError(error_number, os.strerror(error_number))
        return otherwise(*arguments, **options)

    return function


# ---- Atomic write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_full_disk_is_told_with_path_and_cause_and_leaves_the_old_file_whole(tmp_path, monkeypatch, where):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    target = "training.files.open" if where == "open" else f"os.{where}"
    monkeypatch.setattr(target, failing(errno.ENOSPC), raising=False)
    with pytest.raises(RunError, match=r"a\.pt cannot be written: No space left on device"), atomic_write(path) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(("system", "failures", "written"), [("nt", 3, True), ("nt", 9, False), ("posix", 1, False)])
def test_only_on_windows_a_file_that_is_open_elsewhere_is_waited_for(tmp_path, monkeypatch, system, failures, written):
    calls, slept, replace = [], [], os.replace

    def busy(*paths):
        calls.append(paths)
        if len(calls) <= failures:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(*paths)

    monkeypatch.setattr("training.files.os", SimpleNamespace(**vars(os) | {"name": system, "replace": busy}))
    monkeypatch.setattr("time.sleep", slept.append)
    expected = contextlib.nullcontext() if written else pytest.raises(RunError, match="Access is denied")
    with expected, atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["a"] * written
    assert len(slept) == (0 if system == "posix" else min(failures, 4))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_any_error_while_writing_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def is_folder(descriptor):
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, is_folder, os.fsync))
    with atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_temporary_or_a_lock_that_is_a_link_leads_nowhere(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.tmp").symlink_to("victim")
    (tmp_path / ".lock").symlink_to("victim")
    with exclusive(tmp_path / ".lock", wait=False), atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**6))
    with pytest.raises(ValueError, match="it unpacks to more than its"):
        check_archive(path, path.stat().st_size)
    check_archive(path, 10**6)


# ---- The folder of a run -------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(folders, tmp_path):
    with open_run_folder(tmp_path / "run") as first:
        first.path.joinpath("checkpoint.pt.tmp").write_bytes(b"half a checkpoint of the first run")
        before = sorted(os.listdir(first.path))
        with pytest.raises(RunError, match="another run is writing there"), open_run_folder(first.path):
            pass
        result = run_tiny(*flags(folders, first.path))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"error: --output-dir {first.path}: another run is writing there\n"
        assert sorted(os.listdir(first.path)) == before
    with open_run_folder(tmp_path / "run"):  # the lock went with its holder
        pass


def test_a_folder_that_cannot_be_made_or_written_is_told_before_any_work(folders, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("")
    result = run_tiny(*flags(folders, tmp_path / "run"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: --output-dir {tmp_path / 'run'}: File exists\n"
    monkeypatch.setattr("training.files.open", failing(errno.EROFS), raising=False)
    with pytest.raises(RunError, match="Read-only file system"), open_run_folder(tmp_path / "other"):
        pass


@pytest.mark.parametrize("remade", [False, True])
def test_a_run_whose_folder_was_removed_or_replaced_stops_and_overwrites_nothing(tmp_path, remade):
    path = tmp_path / "run"
    with open_run_folder(path) as folder, contextlib.ExitStack() as stack:
        folder.check_lock()
        shutil.rmtree(path)
        if remade:
            other = stack.enter_context(open_run_folder(path))
            other.check_lock()
        with pytest.raises(RunError, match="run: the folder of this run was removed or replaced; nothing was over"):
            folder.check_lock()


def test_the_lock_is_checked_before_each_save(folders, tmp_path, monkeypatch):
    output, checks = tmp_path / "run", []
    check = RunFolder.check_lock

    def replace_at_the_second(folder):
        checks.append(folder)
        if len(checks) == 2:
            shutil.rmtree(output)
            output.mkdir()
            for name in (".lock", "checkpoint.pt", "metrics.csv"):
                (output / name).write_text("of the other run")
        check(folder)

    monkeypatch.setattr(RunFolder, "check_lock", replace_at_the_second)
    result = run_tiny(*flags(folders, output))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "was removed or replaced; nothing was overwritten" in result.stderr
    assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(
        (".lock", "checkpoint.pt", "metrics.csv"), "of the other run"
    )
