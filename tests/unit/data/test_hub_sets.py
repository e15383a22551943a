from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
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


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", CLOSED_PORT)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class _Loader:
    """Stands in for ``datasets.load_dataset``."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.was_offline: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        self.was_offline = datasets.config.HF_HUB_OFFLINE
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def _load_gives(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> _Loader:
    loader = _Loader(outcome)
    monkeypatch.setattr(datasets, "load_dataset", loader)
    return loader


def test_the_table() -> None:
    rows = {name: (s.path, s.config, s.split, s.is_one_document) for name, s in HUB_SETS.items()}
    wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert rows == {
        "pile-10k": ("NeelNanda/pile-10k", None, "train", False),
        "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", False),
        "wikitext-2-raw": (*wikitext, "train", True),
        "wikitext-2-raw-test": (*wikitext, "test", True),
    }
    assert all(re.fullmatch("[0-9a-f]{40}", s.revision) for s in HUB_SETS.values())


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "meta": [{"set": "x"}, {"set": "y"}]})
    loader = _load_gives(monkeypatch, rows)
    documents = open_source("pile-10k")
    assert not loader.calls, "nothing is loaded before the first document is asked for"
    assert list(documents) == [
        PlainText("pile-10k: row 1", "a"),
        PlainText("pile-10k: row 2", "b"),
    ]
    revision = HUB_SETS["pile-10k"].revision
    expected = (("NeelNanda/pile-10k", None), {"split": "train", "revision": revision})
    assert loader.calls == [expected]


def test_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "a", "name": "f"}]
    rows = datasets.Dataset.from_dict({"prompt": ["hi"], "prompt_id": ["0"], "messages": [chat]})
    _load_gives(monkeypatch, rows)
    assert list(open_source("ultrachat_200k")) == [
        Conversation("ultrachat_200k: row 1", tuple(chat))
    ]


def test_wikitext_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = _load_gives(
        monkeypatch, datasets.Dataset.from_dict({"text": ["", " = A = \n", "", " a b . \n"]})
    )
    (document,) = open_source("wikitext-2-raw-test")
    assert document == PlainText("wikitext-2-raw-test", "\n\n = A = \n\n\n\n\n a b . \n")
    assert loader.calls[0][0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")


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
        (ValueError("Couldn't find cache"), "ValueError: Couldn't find cache"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_what_can_go_wrong_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    _load_gives(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        list(open_source("pile-10k"))
    assert str(caught.value) == (
        "pile-10k: NeelNanda/pile-10k is not to be had from the Hugging Face hub or the local "
        f"cache ({reason}): connect once to fill the cache, or give a .txt, .jsonl or .parquet "
        "file, or 'stdlib'"
    )


def test_without_the_packages_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^pile-10k: this needs .* 'nybble\[data\]', or give a"):
        list(open_source("pile-10k"))


def test_the_real_load_gives_up_soon_without_a_hub() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"pile-10k .*cache \(ConnectionError: .*'stdlib'$"):
        list(open_source("pile-10k"))
    assert time.monotonic() - start < 10
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_real_load_takes_a_cached_copy_without_a_hub(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    made = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(tmp_path / "made")
    )
    arrow = Path(made.cache_files[0]["filename"])
    cached = tmp_path / "cache" / "NeelNanda___pile-10k" / "default" / "0.0.0" / "f00"
    cached.mkdir(parents=True)
    shutil.copy(arrow, cached / "pile-10k-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text(encoding="utf-8"))
    info.update(dataset_name="pile-10k", config_name="default", builder_name="parquet")
    (cached / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    texts = [d.text for d in open_source("pile-10k") if isinstance(d, PlainText)]
    assert texts == ["one", "two"]


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
    loader = _load_gives(monkeypatch, datasets.Dataset.from_dict({"text": ["a"]}))
    assert len(list(open_source("pile-10k"))) == 1
    assert loader.was_offline is not is_reachable
    assert datasets.config.HF_HUB_OFFLINE is False
