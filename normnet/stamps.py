"""What tells that a file was changed since it was read, without reading it again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DATA = re.compile(r"^(?:ElementDataFile\s*=|data ?file:)\s*(\S.*?)\s*$", re.MULTILINE)
"""Where the header of a MetaImage or NRRD names the file that has its voxels."""


def stamp(files: Sequence[Path]) -> dict[str, Any]:
    """Sum up names, sizes and times of files.

    Parameters
    ----------
    files : sequence of Path
        A volume, or the files of a DICOM series, in any order. Headers (``.mhd``, ``.nhdr``) bring the file
        of their voxels along.

    Returns
    -------
    dict
        ``files``, ``bytes``, ``modified_ns`` (the latest; nanoseconds since 1970), and ``listing``, the
        SHA-256 of every name, size and time; for JSON.

    Raises
    ------
    OSError
        A file is gone.
    """
    rows = []
    for file in sorted({*files, *(voxels for header in files for voxels in _voxels(header))}):
        status = file.stat()
        rows.append((file.name, status.st_size, status.st_mtime_ns))
    return {
        "files": len(rows),
        "bytes": sum(size for _, size, _ in rows),
        "modified_ns": max(time for _, _, time in rows),
        "listing": hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _voxels(file: Path) -> list[Path]:
    """Files with the voxels of a header; none where it has them itself, or names them by a pattern."""
    if file.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    named = _DATA.findall(file.read_bytes().decode("latin-1"))
    return [path for name in named if (path := file.parent / name).is_file()]
