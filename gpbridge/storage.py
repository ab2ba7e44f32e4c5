"""State on disk: written whole or not at all, checked, and read without running code.

In: a dictionary of tensors, numbers, strings and containers of them. Out: a file that
a crash leaves either old or new, and the same dictionary again. Next: long fits that
can be interrupted.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

_HEADER = b"gpbridge state 1\n"  # then a SHA-256 digest, then what torch.save wrote
_DIGEST = hashlib.sha256().digest_size


class DamagedFileError(ValueError):
    """A file is not a state, or not all of it."""


def save_state(state: Mapping[str, Any], path: str | PathLike) -> None:
    """Write a state dictionary to a file, replacing an old one in one step.

    Args:
        state: Tensors, numbers, strings, and lists, tuples and dictionaries of them.
        path: The file; its folder must exist.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    path = Path(path)
    # In the same folder, since a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_HEADER + hashlib.sha256(payload).digest() + payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_state(path: str | PathLike, map_location: Any = None) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Args:
        path: The file.
        map_location: As for :func:`torch.load`.

    Returns:
        The dictionary.

    Raises:
        FileNotFoundError: If there is none.
        DamagedFileError: If the file is another one, truncated or changed.
    """
    content = Path(path).read_bytes()
    start = len(_HEADER) + _DIGEST
    digest, payload = content[len(_HEADER) : start], content[start:]
    if not content.startswith(_HEADER):
        raise DamagedFileError(
            f"{path} is not a state of gpbridge, or empty. Pass another path, or "
            "delete it to start anew."
        )
    if hashlib.sha256(payload).digest() != digest:
        raise DamagedFileError(
            f"{path} is truncated or was changed: its checksum does not fit its "
            f"{len(payload)} bytes. Delete it and start again."
        )
    return torch.load(io.BytesIO(payload), map_location=map_location, weights_only=True)
