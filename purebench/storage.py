"""Storage: files that are whole or not there, and digests."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from .errors import UsageError


def write_atomic(path: Path, content: bytes) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256(content: bytes | memoryview) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def set_aside(path: Path) -> Path:
    """Rename what is damaged to the first free ``<name>.damaged-<n>``, and say where."""
    number = 1
    while (place := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(place)


def need_writable(folder: Path) -> None:
    """Make the folder, or UsageError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to the output folder {folder}: {error.strerror or error}"
        ) from error
