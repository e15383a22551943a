"""Web servers and the hub as sources: what is asked for, what is read, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sparse_checkpoints import write_index, write_shard, write_sharded
from support.web_server import Answer, WebServer, add_repository, serving

from nybble.core.errors import CheckpointError
from nybble.doctor.snapshot import ProblemKind, Snapshot, take_snapshot
from nybble.doctor.source import Unreachable, open_source

MIB = 2**20
SHARDS = 12
REPO = "owner/tiny-model"
AGAIN = {"Retry-After": "0"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """12 shards of 64 MiB each, most of it never written."""
    folder = tmp_path / "checkpoint"
    write_sharded(
        folder,
        [{f"layers.{n}.{i}.weight": (1024, 1024) for i in range(32)} for n in range(SHARDS)],
    )
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def server(checkpoint: Path) -> Iterator[WebServer]:
    """A plain server of that folder."""
    with serving(checkpoint) as running:
        yield running


@pytest.fixture
def hub(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A hub that has the checkpoint as a repository."""
    root = tmp_path / "hub"
    root.mkdir()
    with serving(root) as running:
        add_repository(running, REPO, checkpoint)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own setting of how long a server may be silent."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)


def same(snapshot: Snapshot, folder: Path) -> bool:
    local = take_snapshot(open_source(str(folder)))
    return (snapshot.config, snapshot.weight_map, snapshot.headers, snapshot.sizes) == (
        local.config,
        local.weight_map,
        local.headers,
        local.sizes,
    )


# A plain server


def test_a_served_folder_reads_like_the_folder(server: WebServer, checkpoint: Path) -> None:
    snapshot = take_snapshot(open_source(f"{server.url}/"))
    assert same(snapshot, checkpoint)
    assert not snapshot.problems


def test_weights_are_not_downloaded(server: WebServer) -> None:
    take_snapshot(open_source(server.url))
    starts = [len(server.asked(f"-of-{SHARDS:05}.safetensors")), SHARDS]
    assert starts == [2 * SHARDS, SHARDS]  # one byte for the size, then the start
    assert server.sent < SHARDS * 0.3 * MIB
    assert 1 < server.most_at_once <= 8


def test_a_header_longer_than_the_first_read_takes_one_more(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.{'x' * 200}.weight": (4,) for n in range(1200)}
    write_shard(tmp_path / "model.safetensors", shapes)
    with serving(tmp_path) as server:
        snapshot = take_snapshot(open_source(server.url))
        assert len(snapshot.headers["model.safetensors"]) == 1200
        assert len(server.asked("/model.safetensors")) == 3


def test_a_server_without_ranges_is_read_from_the_start_only(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": (512, MIB)}])
    name = "model-00001-of-00001.safetensors"
    with serving(tmp_path, ranges=False) as server:
        source = open_source(server.url)
        assert same(take_snapshot(source), tmp_path)
        with (tmp_path / name).open("rb") as file:
            assert source.read(name, 8, 20) == file.read(20)[8:]
        assert server.sent < 128 * MIB  # what fits into the buffers of three connections


def test_a_server_without_ranges_cannot_be_read_deep_in_a_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": (200 * MIB,)}, {"a": "U8"})
    with serving(tmp_path, ranges=False) as server:
        source = open_source(server.url)
        with pytest.raises(CheckpointError, match="does not serve ranges") as caught:
            source.read("model.safetensors", 100 * MIB, 100 * MIB + 8)
        assert not isinstance(caught.value, Unreachable)
        assert server.sent < 64 * MIB


def test_files_that_no_index_names_are_looked_for(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": (2, 2)}])
    write_shard(tmp_path / "mtp.safetensors", {"mtp.norm.weight": (4,)})
    with serving(tmp_path) as server:
        snapshot = take_snapshot(open_source(server.url))
    assert "mtp.norm.weight" in snapshot.headers["mtp.safetensors"]


def test_an_index_cannot_make_us_ask_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    write_sharded(folder, [{"a": (2, 2)}])
    write_shard(tmp_path / "secret.safetensors", {"b": (2, 2)})
    write_index(folder, {"a": "model-00001-of-00001.safetensors", "b": "../secret.safetensors"})
    with serving(tmp_path) as server:
        snapshot = take_snapshot(open_source(f"{server.url}/inner"))
        assert [problem.kind for problem in snapshot.problems] == [ProblemKind.UNSAFE_NAME]
        assert not server.asked("secret.safetensors")


def test_an_index_of_very_many_files_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, [{"a": (2, 2)}])
    write_index(tmp_path, {f"t{n}": f"{n}.safetensors" for n in range(3000)})
    with serving(tmp_path) as server:
        with pytest.raises(Unreachable, match="names 3000 files, too many"):
            open_source(server.url)
        assert len(server.requests) < 100


def test_a_missing_shard_is_a_problem(server: WebServer, checkpoint: Path) -> None:
    (checkpoint / f"model-00003-of-{SHARDS:05}.safetensors").unlink()
    (found,) = take_snapshot(open_source(server.url)).problems
    assert (found.kind, found.file) == (
        ProblemKind.MISSING_FILE,
        f"model-00003-of-{SHARDS:05}.safetensors",
    )


def test_a_truncated_shard_is_a_problem(server: WebServer, checkpoint: Path) -> None:
    path = checkpoint / f"model-00003-of-{SHARDS:05}.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    (found,) = take_snapshot(open_source(server.url)).problems
    assert found.kind is ProblemKind.BROKEN_HEADER
    assert "truncated, 5 of" in found.message


def test_an_empty_file_is_a_problem(server: WebServer, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(b"")
    (found,) = take_snapshot(open_source(server.url)).problems
    assert found.kind is ProblemKind.UNREADABLE_CONFIG


def test_an_address_keeps_its_signature_to_itself(server: WebServer) -> None:
    source = open_source(f"{server.url}/?sig=private")
    assert all(request.path.endswith("?sig=private") for request in server.requests)
    assert "private" not in source.label
    server.always["/config.json"] = Answer(404)
    with pytest.raises(CheckpointError) as caught:
        source.read("config.json")
    assert "private" not in str(caught.value)


def test_no_token_of_the_hub_goes_to_another_server(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    take_snapshot(open_source(server.url))
    assert not [request for request in server.requests if "authorization" in request.headers]


def test_a_server_with_nothing_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with serving(tmp_path) as server, pytest.raises(CheckpointError, match="only pickle weights"):
        take_snapshot(open_source(server.url))


def test_a_store_that_denies_what_is_not_there(server: WebServer, checkpoint: Path) -> None:
    server.always["/nybble.json"] = Answer(403)
    server.always["/quantize_config.json"] = Answer(401)
    assert same(take_snapshot(open_source(server.url)), checkpoint)


def test_a_server_that_denies_everything(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.always["/config.json"] = Answer(403)
        with pytest.raises(Unreachable, match=r"no access \(HTTP 403\)"):
            open_source(server.url)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_once_more(server: WebServer, checkpoint: Path, status: int) -> None:
    shard = f"/model-00001-of-{SHARDS:05}.safetensors"
    server.answers = {name: [Answer(status, AGAIN)] for name in ("/config.json", shard)}
    assert same(take_snapshot(open_source(server.url)), checkpoint)


def test_a_failing_server_is_no_problem_of_a_file(server: WebServer) -> None:
    source = open_source(server.url)
    server.always[f"/model-00005-of-{SHARDS:05}.safetensors"] = Answer(500, AGAIN)
    with pytest.raises(Unreachable, match=r"the server fails \(HTTP 500\); try again later"):
        take_snapshot(source)


@pytest.mark.usefixtures("impatient")
def test_a_silent_server_is_given_up(server: WebServer) -> None:
    source = open_source(server.url)
    server.always["/config.json"] = Answer(200, body=b"{}", delay=0.6)
    with pytest.raises(Unreachable, match=r"no answer within 0.2 seconds"):
        source.read("config.json")
    assert len(server.asked("/config.json")) == 3  # for its size, and twice


def test_a_redirect_is_followed(server: WebServer, checkpoint: Path) -> None:
    with serving(checkpoint) as other:
        for number in range(1, SHARDS + 1):
            path = f"/model-{number:05}-of-{SHARDS:05}.safetensors"
            server.always[path] = Answer(302, {"Location": other.url + path})
        assert same(take_snapshot(open_source(server.url)), checkpoint)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(200, {"Content-Encoding": "gzip"}, b"{}"), "compresses"),
        (Answer(206, {}, b"{}"), "does not say which range"),
        (Answer(206, {"Content-Range": "bytes 5-6/99"}, b"{}"), "does not serve ranges"),
        (Answer(204), "HTTP 204"),
        (Answer(302, {"Location": "/config.json"}), "cannot be reached"),
        (Answer(206, {"Content-Range": "bytes 0-24/25"}, b"{}"), "ends early"),
    ],
)
def test_a_strange_answer_is_refused(server: WebServer, answer: Answer, message: str) -> None:
    source = open_source(server.url)
    server.always["/config.json"] = answer
    with pytest.raises(CheckpointError, match=message) as caught:
        source.read("config.json")
    assert "\n" not in str(caught.value)


def test_no_server_is_there(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        gone = server.url
    with pytest.raises(Unreachable, match="cannot be reached"):
        open_source(gone)


# The hub


@pytest.mark.parametrize("form", ["{repo}", "hf:{repo}", "{url}/{repo}", "{url}/{repo}/tree/v1/"])
def test_a_repository_reads_like_the_folder(hub: WebServer, checkpoint: Path, form: str) -> None:
    add_repository(hub, REPO, checkpoint, commit="decaf", revision="v1")
    source = open_source(form.format(repo=REPO, url=hub.url))
    assert same(take_snapshot(source), checkpoint)
    assert hub.sent < SHARDS * 0.3 * MIB
    commit = "decaf" if "v1" in form else "c0ffee"
    read = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert len(read) == SHARDS + 3  # the shards, the index, and two more
    assert all(path.startswith(f"/{REPO}/resolve/{commit}/") for path in read)


@pytest.mark.parametrize("where", [f"hf:{REPO}@refs/pr/1", REPO])
def test_a_revision_is_resolved_to_a_commit(hub: WebServer, checkpoint: Path, where: str) -> None:
    add_repository(hub, REPO, checkpoint, commit="beef", revision="refs/pr/1")
    source = open_source(where, None if "@" in where else "refs/pr/1")
    assert source.label == f"{REPO}@refs/pr/1"
    source.read("config.json")
    assert len(hub.asked("/resolve/beef/config.json")) == 1


def test_two_revisions_are_one_too_many(hub: WebServer) -> None:
    for where in (f"hf:{REPO}@v1", f"{hub.url}/{REPO}/tree/v1"):
        with pytest.raises(CheckpointError, match="one too many"):
            open_source(where, "v2")


def test_files_in_subfolders_are_not_the_checkpoint(hub: WebServer, checkpoint: Path) -> None:
    (checkpoint / "original").mkdir()
    write_shard(checkpoint / "original" / "consolidated.safetensors", {"a": (2,)})
    add_repository(hub, "owner/other", checkpoint)
    assert not [name for name in open_source("owner/other").sizes() if "consolidated" in name]


def test_the_token_stays_with_the_hub(hub: WebServer, checkpoint: Path) -> None:
    with serving(checkpoint) as cdn:
        for number in range(1, SHARDS + 1):
            name = f"model-{number:05}-of-{SHARDS:05}.safetensors"
            location = {"Location": f"{cdn.url}/{name}"}
            hub.always[f"/{REPO}/resolve/c0ffee/{name}"] = Answer(302, location)
        assert same(take_snapshot(open_source(REPO)), checkpoint)
        assert len(cdn.requests) == SHARDS
        assert not [request for request in cdn.requests if "authorization" in request.headers]
    assert {request.headers["authorization"] for request in hub.requests} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(404, {"X-Error-Code": "RepoNotFound"}), "neither a folder here nor a repository"),
        (Answer(401), "no access|neither a folder here nor"),
        (Answer(403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its terms at"),
        (Answer(403), r"no access \(HTTP 403\)"),
        (Answer(404, {"X-Error-Code": "RevisionNotFound"}), "has no revision"),
        (Answer(200, body=b"<html>"), "is of no use"),
        (Answer(200, body=b"[]"), "is of no use"),
        (Answer(418), "HTTP 418"),
    ],
)
def test_a_repository_out_of_reach(hub: WebServer, answer: Answer, message: str) -> None:
    hub.always[f"/api/models/{REPO}"] = answer
    with pytest.raises(Unreachable, match=message) as caught:
        open_source(REPO)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_files_of_a_gated_repository(hub: WebServer) -> None:
    hub.always[f"/{REPO}/resolve/c0ffee/config.json"] = Answer(403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(
        Unreachable, match=r"no access \(HTTP 403\); accept the terms at .*, and log"
    ):
        take_snapshot(open_source(REPO))


def test_a_hub_that_fails_once_is_asked_again(hub: WebServer, checkpoint: Path) -> None:
    hub.answers[f"/api/models/{REPO}"] = [Answer(503)]
    assert same(take_snapshot(open_source(REPO)), checkpoint)


def test_offline_is_offline(hub: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE forbids"):
        open_source(REPO)
    assert not hub.requests


def test_a_page_of_the_hub_that_is_no_repository(hub: WebServer) -> None:
    for page in ("datasets/a/b", f"{REPO}/blob/main/config.json", "a/b/tree/main/sub/folder"):
        with pytest.raises(CheckpointError, match="is not the address of a model repository"):
            open_source(f"{hub.url}/{page}")
    assert not hub.requests


def test_a_listed_file_without_a_size_is_not_there(hub: WebServer) -> None:
    siblings = [{"rfilename": "config.json", "size": 2}, {"rfilename": "model.safetensors"}]
    info = {"id": REPO, "sha": "c0ffee", "siblings": siblings}
    hub.always[f"/api/models/{REPO}"] = Answer(200, body=json.dumps(info).encode())
    assert dict(open_source(REPO).sizes()) == {"config.json": 2}
