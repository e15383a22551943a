from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from nybble.core.errors import DataError
from nybble.data import hub
from nybble.data.documents import Conversation, PlainText
from nybble.data.hub import HUB_SETS
from nybble.data.sources import open_source

datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
httpx = datasets.utils.file_utils.httpx

CLOSED_PORT = "http://127.0.0.1:9"
A_COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", CLOSED_PORT)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class _Hub:
    """Stands in for ``datasets.load_dataset_builder`` and the builder that it returns."""

    def __init__(self, outcome: Any, commit: str | None = None) -> None:
        self.outcome = outcome
        self.commit = commit
        self.hash: str | None = None
        self.asked: list[tuple[str, str, str]] = []
        self.splits: list[str] = []
        self.is_prepared = False

    def __call__(self, path: str, config: str, *, revision: str) -> _Hub:
        self.asked.append((path, config, revision))
        self.hash = self.commit or revision
        return self

    def download_and_prepare(self) -> None:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        self.is_prepared = True

    def as_dataset(self, split: str) -> Any:
        assert self.is_prepared
        self.splits.append(split)
        return self.outcome


def _hub_gives(monkeypatch: pytest.MonkeyPatch, outcome: Any, commit: str | None = None) -> _Hub:
    loader = _Hub(outcome, commit)
    monkeypatch.setattr(datasets, "load_dataset_builder", loader)
    monkeypatch.setattr(hub, "_is_reachable", lambda _: True)
    return loader


def test_the_table() -> None:
    rows = {name: (s.path, s.config, s.split, s.is_one_document) for name, s in HUB_SETS.items()}
    wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert rows == {
        "pile-10k": ("NeelNanda/pile-10k", "default", "train", False),
        "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", "default", "train_sft", False),
        "wikitext-2-raw": (*wikitext, "train", True),
        "wikitext-2-raw-test": (*wikitext, "test", True),
    }
    assert all(re.fullmatch("[0-9a-f]{40}", s.revision) for s in HUB_SETS.values())


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "meta": [{"set": "x"}, {"set": "y"}]})
    loader = _hub_gives(monkeypatch, rows)
    documents = open_source("pile-10k")
    assert not loader.asked, "nothing is loaded before the first document is asked for"
    assert list(documents) == [
        PlainText("pile-10k: row 1", "a"),
        PlainText("pile-10k: row 2", "b"),
    ]
    assert loader.asked == [("NeelNanda/pile-10k", "default", HUB_SETS["pile-10k"].revision)]
    assert loader.splits == ["train"]


def test_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "a", "name": "f"}]
    rows = datasets.Dataset.from_dict({"prompt": ["hi"], "prompt_id": ["0"], "messages": [chat]})
    _hub_gives(monkeypatch, rows)
    assert list(open_source("ultrachat_200k")) == [
        Conversation("ultrachat_200k: row 1", tuple(chat))
    ]


def test_wikitext_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = _hub_gives(
        monkeypatch, datasets.Dataset.from_dict({"text": ["", " = A = \n", "", " a b . \n"]})
    )
    (document,) = open_source("wikitext-2-raw-test")
    assert document == PlainText("wikitext-2-raw-test", "\n\n = A = \n\n\n\n\n a b . \n")
    assert loader.asked[0][:2] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert loader.splits == ["test"]


def test_no_more_of_a_data_set_is_decoded_than_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[str] = []

    def noted(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        assert list(batch) == ["text"]
        decoded.extend(batch["text"])
        return batch

    texts = [str(number) for number in range(1000)]
    rows = datasets.Dataset.from_dict({"image": texts, "text": texts})
    _hub_gives(monkeypatch, rows.with_transform(noted))
    assert len(list(islice(open_source("pile-10k"), 5))) == 5
    assert decoded == texts[:5]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:org/set@REV:train", ("org/set", "default", "train")),
        ("hf:Or-g.1/se_t/wiki-v1.5@REV:test.x", ("Or-g.1/se_t", "wiki-v1.5", "test.x")),
    ],
)
def test_any_data_set_by_its_address(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str, str]
) -> None:
    source = source.replace("REV", A_COMMIT)
    rows = datasets.Dataset.from_dict({"text": [None, "b"], "conversations": [CHAT, None]})
    loader = _hub_gives(monkeypatch, rows)
    assert list(open_source(source)) == [
        Conversation(f"{source}: row 1", tuple(CHAT)),
        PlainText(f"{source}: row 2", "b"),
    ]
    path, config, split = expected
    assert loader.asked == [(path, config, A_COMMIT)]
    assert loader.splits == [split]


@pytest.mark.parametrize(
    "source",
    [
        "hf:",
        "hf:org/set",
        "hf:org/set:train",
        "hf:org/set@main:train",
        f"hf:org/set@{A_COMMIT[:-1]}:train",
        f"hf:org/set@{A_COMMIT}0:train",
        f"hf:org/set@{A_COMMIT.upper()}:train",
        f"hf:org/set@{A_COMMIT}",
        f"hf:org/set@{A_COMMIT}:",
        f"hf:org/set@{A_COMMIT}:train[:5%]",
        f"hf:set@{A_COMMIT}:train",
        f"hf:org/set/a/b@{A_COMMIT}:train",
        f"hf: org/set@{A_COMMIT}:train",
    ],
)
def test_an_address_of_another_form_is_refused_at_once(source: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(source)
    assert str(caught.value) == (
        f"{source!r} is not hf:OWNER/NAME@COMMIT:SPLIT or hf:OWNER/NAME/CONFIG@COMMIT:SPLIT, "
        "with all 40 digits of a commit of the data set (a branch or a tag may move)"
    )


def test_a_data_set_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"body": ["a"], "tools": [None]})
    _hub_gives(monkeypatch, rows)
    with pytest.raises(DataError) as caught:
        list(open_source("pile-10k"))
    assert str(caught.value) == (
        "pile-10k: no column text or messages or conversations; the columns are 'body', 'tools'"
    )


def _http_error() -> HfHubHTTPError:
    request = httpx.Request("GET", CLOSED_PORT)
    return HfHubHTTPError("gone", response=httpx.Response(500, request=request))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no way\nsecond line"), "ConnectionError: no way"),
        (httpx.ConnectError("refused"), "ConnectError: refused"),
        (httpx.ReadTimeout("slow"), "ReadTimeout: slow"),
        (_http_error(), "HfHubHTTPError: gone"),
        (datasets.exceptions.DatasetNotFoundError("private"), "DatasetNotFoundError: private"),
        (
            datasets.exceptions.DatasetGenerationError("half a file"),
            "DatasetGenerationError: half a file",
        ),
        (ValueError("Unknown split"), "ValueError: Unknown split"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_what_can_go_wrong_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    _hub_gives(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        list(open_source("pile-10k"))
    assert str(caught.value) == (
        "pile-10k: cannot load split train of NeelNanda/pile-10k (default) at "
        f"{HUB_SETS['pile-10k'].revision} ({reason}): check these, or give a .txt, .jsonl or "
        ".parquet file, or 'stdlib'"
    )


def test_another_commit_than_the_one_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = _hub_gives(monkeypatch, datasets.Dataset.from_dict({"text": ["a"]}), A_COMMIT)
    with pytest.raises(DataError, match=rf"only {A_COMMIT} is to be had"):
        list(open_source("pile-10k"))
    assert not loader.is_prepared


def test_without_the_packages_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^pile-10k: this needs .* 'nybble\[data\]', or give a"):
        list(open_source("pile-10k"))


@pytest.mark.parametrize("is_offline", [False, True])
def test_the_real_load_gives_up_soon_without_a_hub(
    monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(open_source("pile-10k"))
    assert time.monotonic() - start < 10
    assert str(caught.value) == (
        f"pile-10k: NeelNanda/pile-10k at {HUB_SETS['pile-10k'].revision} is not in the local "
        "cache, and the Hugging Face hub does not answer: connect once to fill the cache, or give "
        "a .txt, .jsonl or .parquet file, or 'stdlib'"
    )


def _fill_cache(folder: Path, revision: str, texts: list[str]) -> None:
    """Puts a copy of pile-10k where ``datasets`` would, made by ``datasets`` from a file."""
    source = folder / f"{revision}.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    made = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "made")
    )
    arrow = Path(made.cache_files[0]["filename"])
    cached = folder / "cache" / "NeelNanda___pile-10k" / "default" / "0.0.0" / revision
    cached.mkdir(parents=True)
    shutil.copy(arrow, cached / "pile-10k-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text(encoding="utf-8"))
    info.update(dataset_name="pile-10k", config_name="default", builder_name="parquet")
    (cached / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def test_the_commits_copy_in_the_cache_is_taken_without_asking_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fill_cache(tmp_path, HUB_SETS["pile-10k"].revision, ["one", "two"])
    _fill_cache(tmp_path, A_COMMIT, ["newer"])

    def refuse(_: object) -> bool:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub, "_is_reachable", refuse)
    texts = [d.text for d in open_source("pile-10k") if isinstance(d, PlainText)]
    assert texts == ["one", "two"]
    address = f"hf:NeelNanda/pile-10k@{A_COMMIT}:train"
    assert list(open_source(address)) == [PlainText(f"{address}: row 1", "newer")]
    with pytest.raises(DataError, match=r"cannot load split test .*Unknown split"):
        list(open_source(address.replace(":train", ":test")))


def test_another_commits_copy_in_the_cache_is_not_taken(tmp_path: Path) -> None:
    _fill_cache(tmp_path, A_COMMIT, ["newer"])
    with pytest.raises(DataError, match="is not in the local cache"):
        list(open_source("pile-10k"))


@pytest.fixture
def server() -> Iterator[type[_Handler]]:
    with HTTPServer(("127.0.0.1", 0), _Handler) as listening:
        _Handler.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield _Handler
        listening.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    url = ""
    status = 404
    delay = 0.0

    def do_HEAD(self) -> None:
        time.sleep(self.delay)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.mark.parametrize(
    ("status", "delay", "is_reachable"),
    [(200, 0, True), (307, 0, True), (404, 0, True), (503, 0, False), (200, 0.5, False)],
)
def test_the_hub_is_asked_once_whether_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
    server: type[_Handler],
    status: int,
    delay: float,
    is_reachable: bool,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(server, "status", status)
    monkeypatch.setattr(server, "delay", delay)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    assert hub._is_reachable(HUB_SETS["pile-10k"]) is is_reachable
