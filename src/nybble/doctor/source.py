"""Where a checkpoint is: files by plain name, of which any range of bytes can be read."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from os import stat_result
from pathlib import Path
from typing import ClassVar, Protocol

from nybble.checkpoint.ondisk import regular_size, shown
from nybble.core.errors import CheckpointError

_MAX_NAME_BYTES = 255
_WEB_PREFIXES = ("http://", "https://")
_HUB_PREFIX = "hf:"
_HUB_NAME = re.compile(r"(?P<repo>(?:[\w.-]+/)?[\w.-]+)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
_OWNER_AND_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


class Source(Protocol):
    """A folder, a hub repository or a web address. Methods raise CheckpointError if it fails."""

    @property
    def label(self) -> str:
        """What the user called it."""
        ...

    @property
    def parallel(self) -> int:
        """How many reads at a time pay off."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file at the top level, by name; as far as the source can list them."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` of a file, fewer where it ends earlier."""
        ...


class Unreachable(CheckpointError):
    """The source itself fails: no file in it is to blame, and asking for another is no use."""


@dataclass(frozen=True)
class LocalSource:
    """A folder. Links are followed: a hub cache is made of them."""

    folder: Path
    parallel: ClassVar[int] = 1

    @property
    def label(self) -> str:
        """The folder, as it was given."""
        return str(self.folder)

    def sizes(self) -> Mapping[str, int]:
        """All but folders, links to nowhere and names that no index could give.

        What is no regular file counts 0 bytes; reading it fails. Raises Unreachable if the folder
        cannot be listed.
        """
        sizes = {}
        try:
            for path in sorted(self.folder.iterdir()):
                status = _status(path)
                if status is not None and not stat.S_ISDIR(status.st_mode):
                    sizes[path.name] = status.st_size
        except OSError as error:
            raise Unreachable(f"cannot open {self.label}: {error.strerror}") from error
        return {name: size for name, size in sizes.items() if is_plain_name(name)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a regular file. Raises CheckpointError for anything else."""
        if not is_plain_name(name):
            raise CheckpointError(f"{shown(name)} is no file of {self.label}")
        path = self.folder / name
        size = regular_size(path)
        stop = size if stop is None else min(stop, size)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(max(stop - start, 0))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def open_source(where: str, revision: str | None = None) -> Source:
    """The checkpoint that a user names.

    ``where`` is a folder, a web address (of a plain server's folder, or of a repository on the
    hub), ``OWNER/NAME`` where no such folder exists, or ``hf:OWNER/NAME[@REVISION]``.

    Raises CheckpointError if it is none of these, if ``revision`` is given for what has none, or
    if the source cannot be reached.
    """
    if where.lower().startswith(_WEB_PREFIXES):
        from nybble.doctor import remote

        return remote.open_address(where, revision)
    status = _status(Path(where)) if where else None  # an empty path would be this folder
    if status is None:
        return _open_repository(where, revision)
    if not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{where} is no folder; give that of the checkpoint")
    if revision is not None:
        raise CheckpointError(f"{where} is a folder, which has no revision {revision!r}")
    return LocalSource(Path(where))


def is_plain_name(name: str) -> bool:
    """Whether it is safe and possible as the name of a file directly in a folder."""
    # isprintable() refuses NUL, line breaks, lone surrogates and marks that turn text around.
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and not {"/", "\\"}.intersection(name)
        and len(name.encode()) <= _MAX_NAME_BYTES
    )


def _status(path: Path) -> stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):  # ValueError: NUL in the name
        return None


def _open_repository(where: str, revision: str | None) -> Source:
    found = _HUB_NAME.fullmatch(where.removeprefix(_HUB_PREFIX))
    is_hub = where.startswith(_HUB_PREFIX) or _OWNER_AND_NAME.fullmatch(where)
    if found is None or not is_hub:
        raise CheckpointError(
            f"{shown(where)}: there is no such folder; give one, OWNER/NAME of a hub repository, "
            "or the address of a web server's folder"
        )
    if revision is not None and found["revision"] is not None:
        raise CheckpointError(f"{where} names a revision already: {revision!r} is one too many")
    from nybble.doctor import remote

    return remote.open_repository(found["repo"], found["revision"] or revision)
