"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Not hidden, so that leftovers of a killed job are seen; no reader looks for this ending.
PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the context ends well."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system lets us."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, content: object) -> None:
    """Writes indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content, atomically."""
    with open(source, "rb") as reader, atomic_file(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def take_lock(file: IO) -> bool:
    """Takes the lock of an open file, which the system gives back when the process ends."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        # A file system without locks: better to work there unprotected than not at all.
    return True


@contextlib.contextmanager
def one_at_a_time(folder: str | Path | None) -> Iterator[None]:
    """Waits for other processes that work in a folder which several share; None: no such folder."""
    if folder is None:
        yield
        return
    with open(Path(folder) / "lock", "w") as file:
        if not take_lock(file):
            print(f"Waiting for another process that works in {folder}", flush=True)
            while not take_lock(file):
                time.sleep(1)
        yield
