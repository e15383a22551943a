"""A result's folder: staged beside its final place, and moved there only when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.core.atomic import fsync_path
from nybble.core.errors import OutputError


def refuse_used(out: Path) -> None:
    """Raises OutputError unless ``out`` is an empty folder, or nothing is there."""
    try:
        used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise OutputError(f"cannot use {out}: {error.strerror}") from error
    if used:
        raise OutputError(f"{out} exists already: give another output folder")


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A fresh folder beside ``out`` that becomes ``out`` if the body succeeds, else vanishes.

    Raises OutputError if it cannot be created or moved.
    """
    out = out.resolve()
    with _fresh_folder(out) as staging:
        yield staging
        try:
            staging.replace(out)  # over an empty folder, or where nothing is
            fsync_path(out.parent)
        except OSError as error:
            raise OutputError(f"cannot move {staging} to {out}: {error.strerror}") from error


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside ``folder`` that takes its place if the body succeeds, else vanishes.

    Hidden entries of ``folder`` (.git) move over; the rest of it is deleted, last of all: whenever
    the process is killed, one of the two folders is whole. Raises OutputError if it cannot be
    created or moved, or if an earlier exchange was cut short.
    """
    folder = folder.resolve()
    retired = folder.with_name(folder.name + ".replaced")
    if retired.exists():
        raise OutputError(f"{retired} is left of an exchange that was cut short: look at it first")
    with _fresh_folder(folder) as staging:
        yield staging
        try:
            folder.replace(retired)
            try:
                staging.replace(folder)
            except BaseException:
                retired.replace(folder)
                raise
            for entry in list(retired.iterdir()):
                if entry.name.startswith("."):
                    entry.replace(folder / entry.name)
            fsync_path(folder.parent)
            shutil.rmtree(retired)
        except OSError as error:
            raise OutputError(
                f"cannot exchange {folder} for {staging}: {error.strerror}"
            ) from error


@contextmanager
def _fresh_folder(beside: Path) -> Iterator[Path]:
    """An empty folder with a name like ``beside``'s; it vanishes if the body fails."""
    staging = beside.with_name(beside.name + ".partial")
    try:
        if staging.exists():
            shutil.rmtree(staging)  # left by a run that was killed
        beside.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise OutputError(f"cannot create {staging}: {error.strerror}") from error
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
