from __future__ import annotations

from pathlib import Path

import pytest

from nybble.checkpoint.staging import replaced_folder, staged_folder
from nybble.core.errors import OutputError


def test_a_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged_folder(out) as staging:
        (staging / "weights").write_text("w")
        assert staging.parent == out.parent
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "weights").read_text() == "w"


def test_a_staged_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as staging:
        (staging / "weights").write_text("w")
    assert (tmp_path / "out" / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [OutputError("full"), KeyboardInterrupt(), MemoryError()])
def test_a_staged_folder_vanishes_on_any_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged_folder(tmp_path / "out") as staging:
        (staging / "weights").write_text("w")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model.safetensors.partial").write_text("half")
    with staged_folder(tmp_path / "out") as staging:
        assert list(staging.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot move"), staged_folder(out) as staging:
        (staging / "weights").write_text("w")
        out.mkdir()
        (out / "model.safetensors").write_text("of another process")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create"), staged_folder(tmp_path / "file" / "x"):
        pass


def test_the_current_folder_can_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is refused in one line: but its path has no name to put .partial behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        with staged_folder(Path()) as staging:
            (staging / "weights").write_text("w")
    except OutputError:
        assert list((tmp_path / "here").iterdir()) == []
    else:
        assert (tmp_path / "here" / "weights").read_text() == "w"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def used(folder: Path) -> Path:
    folder.mkdir()
    (folder / "weights").write_text("old")
    (folder / "stale").write_text("old")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_replaced_but_for_what_is_hidden(tmp_path: Path) -> None:
    folder = used(tmp_path / "model")
    with replaced_folder(folder) as staging:
        (staging / "weights").write_text("new")
        assert contents(folder)["weights"] == "old"
    assert contents(tmp_path) == {"model/weights": "new", "model/.git/HEAD": "ref"}


@pytest.mark.parametrize("error", [OutputError("full"), KeyboardInterrupt()])
def test_a_folder_stays_as_it_is_on_any_failure(tmp_path: Path, error: BaseException) -> None:
    folder = used(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(type(error)), replaced_folder(folder) as staging:
        (staging / "weights").write_text("new")
        raise error
    assert contents(tmp_path) == before


def test_what_an_exchange_that_was_cut_short_left_is_not_touched(tmp_path: Path) -> None:
    folder, left = used(tmp_path / "model"), used(tmp_path / "model.replaced")
    with pytest.raises(OutputError, match="cut short"), replaced_folder(folder):
        pass
    assert contents(left)["weights"] == "old"


def test_a_failed_exchange_puts_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = used(tmp_path / "model")
    before = contents(tmp_path)
    rename = Path.replace

    def refuse_staging(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse_staging)
    with pytest.raises(OutputError, match="cannot exchange"), replaced_folder(folder):
        pass
    assert contents(tmp_path) == before
