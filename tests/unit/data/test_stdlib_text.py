from __future__ import annotations

from pathlib import Path

from nybble.data.stdlib import documents, source_files, split_of


def test_a_split_depends_on_the_relative_path_alone() -> None:
    # Fixed for good: a changed rule would move trained-on files into the held-out split.
    names = [f"{letter}.py" for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert [name for name in names if split_of(name) == "heldout"] == ["e.py", "n.py", "q.py"]


def test_the_splits_part_the_library() -> None:
    train, heldout = source_files("train"), source_files("heldout")
    assert not set(train) & set(heldout)
    assert 0 < len(heldout) < len(train)
    assert train == sorted(train)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in train)


def test_documents_are_the_files_texts(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    names = [f"pkg/m{i}.py" for i in range(40)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "pkg" / "__pycache__").mkdir()
    (tmp_path / "pkg" / "__pycache__" / "m.py").write_text("# not this one\n", encoding="utf-8")
    (tmp_path / "_sysconfigdata_x.py").write_text("# nor this one\n", encoding="utf-8")
    both = [*documents("train", tmp_path), *documents("heldout", tmp_path)]
    assert sorted(both) == sorted(f"# {name}\n" for name in names)
