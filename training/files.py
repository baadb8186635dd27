"""Files that are whole or not there, locks that die with their process, and archives that cannot fill the memory."""

import contextlib
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from training.config import RunError

try:
    import fcntl  # POSIX only; elsewhere nothing is locked
except ImportError:
    fcntl = None

LOCKS = fcntl is not None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file that replaces `path` only when it is whole and on the disk; on any error `path` stays as it was.

    Raises:
        RunError: naming `path` and the cause, if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a process that died
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
        if os.name == "posix":
            directory = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some file systems cannot sync a directory
                os.fsync(directory)
            os.close(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
        raise


def replace(source: Path, target: Path) -> None:
    """As os.replace; on Windows, where no open file can be replaced, wait for a virus scanner to finish with it."""
    for seconds in (0.1, 0.3, 1, 3):
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name == "posix":
                raise
            time.sleep(seconds)
    os.replace(source, target)


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[BinaryIO]:
    """Hold a lock file until the end; without `wait`, raise BlockingIOError if another process holds it."""
    with open(path, "ab+") as file:  # append: a file that is there stays as it is
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


def check_archive(file: Path | BinaryIO, size: int) -> None:
    """Refuse a zip archive that unpacks to more than the `size` of its file.

    Raises:
        ValueError: if it does.
    """
    with zipfile.ZipFile(file) as archive:
        if sum(item.file_size for item in archive.infolist()) > size:
            raise ValueError(f"it unpacks to more than its {size:,} bytes")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with the lock that the process which writes there holds."""

    path: Path
    lock: BinaryIO | None = None

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def fresh(self) -> Path:
        """Marks that `--fresh` has yet to remove the old run."""
        return self.path / ".fresh"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def check_lock(self) -> None:
        """Stop before writing where the folder was removed, and perhaps made again by another run."""
        try:
            own = os.path.samestat(os.stat(self.lock.name), os.fstat(self.lock.fileno()))
        except OSError:
            own = False
        if not own:
            raise RunError(f"{self.path}: the folder of this run was removed or replaced; nothing was overwritten")


@contextlib.contextmanager
def open_run_folder(path: Path) -> Iterator[RunFolder]:
    """Lock the folder of a run, after a check that it can be written.

    Raises:
        RunError: naming the folder and the cause.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(exclusive(path / ".lock", wait=False))
            with atomic_write(path / ".probe"):
                pass
            (path / ".probe").unlink()
        except BlockingIOError:
            raise RunError(f"--output-dir {path}: another run is writing there") from None
        except OSError as error:
            raise RunError(f"--output-dir {path}: {error.strerror}") from None
        yield RunFolder(path, lock)
