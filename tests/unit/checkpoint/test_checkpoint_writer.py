from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from nybble.checkpoint.dtypes import TORCH_DTYPES
from nybble.checkpoint.headers import read_header
from nybble.checkpoint.index import open_index
from nybble.checkpoint.reader import CheckpointReader
from nybble.checkpoint.writer import ShardWriter, TensorSpec, plan_shards
from nybble.core.errors import CheckpointError, OutputError

F32, BF16, I32, U8 = torch.float32, torch.bfloat16, torch.int32, torch.uint8


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def save(folder: Path, tensors: dict[str, torch.Tensor], order: list[str], limit: int) -> None:
    with ShardWriter(folder, plan_shards(specs_of(tensors), limit)) as writer:
        for name in order:
            writer.write(name, tensors[name])
        writer.finish()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(U8).tolist())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embed": torch.randn(16, 4, generator=generator).bfloat16(),
        "odd": torch.randint(0, 255, (3,), dtype=U8, generator=generator),
        "qweight": torch.randint(-(2**31), 2**31, (4, 4), dtype=I32, generator=generator),
        "scale": torch.randn((), generator=generator),
        "none": torch.empty(0, 4, dtype=torch.float16),
    }


def test_one_shard(tmp_path: Path) -> None:
    tensors = some_tensors()
    save(tmp_path, tensors, list(tensors), 10**6)
    assert names(tmp_path) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_many_shards(tmp_path: Path) -> None:
    tensors = some_tensors()
    save(tmp_path, tensors, list(tensors), 100)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert names(tmp_path) == [*shards, "model.safetensors.index.json"]
    text = (tmp_path / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    assert text.endswith("}\n")
    assert index["metadata"] == {"total_size": 128 + 3 + 64 + 4}
    assert list(index["weight_map"]) == sorted(tensors)
    assert [index["weight_map"][name] for name in tensors] == [shards[0], *[shards[1]] * 4]
    assert open_index(tmp_path).total_bytes == index["metadata"]["total_size"]


def test_the_layout_is_known_before_writing() -> None:
    specs = [TensorSpec("a", U8, (3,)), TensorSpec("b", F32, (2,)), TensorSpec("c", BF16, (1,))]
    layout = plan_shards(specs, 100)
    (shard,) = layout.shards
    length = int.from_bytes(shard.header[:8], "little")
    assert len(shard.header) == 8 + length
    assert length % 8 == 0
    assert json.loads(shard.header[8:]) == {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "c": {"dtype": "BF16", "shape": [1], "data_offsets": [8, 10]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [10, 13]},
    }
    start = len(shard.header)
    assert shard.offsets == {"b": start, "c": start + 8, "a": start + 10}
    assert shard.size == start + 13
    assert layout.total_size == 13
    assert layout.weight_map == dict.fromkeys("abc", "model.safetensors")


def test_greedy_in_the_given_order() -> None:
    sizes = {"a": 4, "b": 6, "big": 25, "c": 9, "none": 0, "d": 1, "e": 1}
    layout = plan_shards([TensorSpec(name, U8, (size,)) for name, size in sizes.items()], 10)
    groups = [[spec.name for spec in shard.specs] for shard in layout.shards]
    assert groups == [["a", "b"], ["big"], ["c", "none", "d"], ["e"]]
    assert layout.shards[-1].file_name == "model-00004-of-00004.safetensors"


def test_specs_that_cannot_be_planned() -> None:
    def plan(*specs: TensorSpec, limit: int = 100) -> Callable[[], object]:
        return lambda: plan_shards(specs, limit)

    spec = TensorSpec("a", U8, (1,))
    assert refusal(plan(spec, spec)) == "tensor 'a' is planned twice"
    assert "'__metadata__'" in refusal(plan(TensorSpec("__metadata__", U8, (1,))))
    assert "'\\ud800'" in refusal(plan(TensorSpec("\ud800", U8, (1,))))
    assert "torch.quint8" in refusal(plan(TensorSpec("a", torch.quint8, (1,))))
    assert "without tensors" in refusal(plan())
    assert "at least 1 byte, got 0" in refusal(plan(spec, limit=0))


def test_a_header_over_the_limit_of_the_format() -> None:
    specs = [TensorSpec("x" * 10**8, U8, (1,))]
    assert "use smaller shards" in refusal(lambda: plan_shards(specs, 100))


def test_write_returns_the_hash_and_raw_bytes_are_the_same(tmp_path: Path) -> None:
    tensors = some_tensors()
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    layout = plan_shards(specs_of(tensors), 100)
    with ShardWriter(one, layout) as writer:
        first = {name: writer.write(name, tensor) for name, tensor in tensors.items()}
        writer.finish()
    with open_reader(one) as reader, ShardWriter(two, layout) as writer:
        second = {name: writer.write_raw(name, [reader.raw(name)]) for name in tensors}
        writer.finish()
    assert first == second
    assert first == {name: hashlib.sha256(bytes_of(t)).hexdigest() for name, t in tensors.items()}
    for path in two.iterdir():
        assert path.read_bytes() == (one / path.name).read_bytes()


def open_reader(folder: Path) -> CheckpointReader:
    (folder / "config.json").write_text("{}")
    return CheckpointReader(folder)


def test_the_order_of_writing_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    digests = set()
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        order = random.Random(seed).sample(list(tensors), len(tensors))
        save(folder, tensors, order, 100)
        content = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
        digests.add(hashlib.sha256(repr(content).encode()).hexdigest())
    assert len(digests) == 1


def test_a_tensor_of_several_chunks(tmp_path: Path) -> None:
    big = torch.arange(5 * 2**20, dtype=I32)  # 20 MiB
    with ShardWriter(tmp_path, plan_shards(specs_of({"big": big}), 1)) as writer:
        digest = writer.write("big", big)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["big"], big)
    with open_reader(tmp_path) as reader:
        assert reader.sha256("big") == digest


def test_parameters_can_be_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    save(tmp_path, {"w": weight}, ["w"], 100)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], weight)


def test_tensors_that_are_not_as_planned(tmp_path: Path) -> None:
    layout = plan_shards([TensorSpec("a", F32, (2, 3)), TensorSpec("b", U8, (2,))], 100)
    with ShardWriter(tmp_path, layout) as writer:
        assert "'c' is not in the plan" in refusal(lambda: writer.write("c", torch.ones(1)))
        assert "'c' is not in the plan" in refusal(lambda: writer.write_raw("c", [b""]))
        message = refusal(lambda: writer.write("a", torch.ones(2, 3).half()))
        assert "is torch.float16 (2, 3), planned was torch.float32 (2, 3)" in message
        assert "is torch.float32 (3, 2)" in refusal(lambda: writer.write("a", torch.ones(3, 2)))
        assert "not contiguous" in refusal(lambda: writer.write("a", torch.ones(3, 2).T))
        assert "has 23 bytes, planned were 24" in refusal(
            lambda: writer.write_raw("a", [bytes(23)])
        )
        writer.write("a", torch.ones(2, 3))
        assert "'a' is written twice" in refusal(lambda: writer.write("a", torch.ones(2, 3)))
        assert "'a' is written twice" in refusal(lambda: writer.write_raw("a", [bytes(24)]))


def test_raw_bytes_of_any_item_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, plan_shards([TensorSpec("a", F32, (2,))], 100)) as writer:
        writer.write_raw("a", [memoryview(b"abcdefgh").cast("I")])
        writer.finish()
    assert (tmp_path / "model.safetensors").read_bytes().endswith(b"abcdefgh")


def test_finish_names_what_is_missing(tmp_path: Path) -> None:
    layout = plan_shards([TensorSpec(name, U8, (1,)) for name in "abcde"], 100)

    def run() -> None:
        with ShardWriter(tmp_path, layout) as writer:
            writer.write_raw("b", [b"1"])
            writer.finish()

    message = "4 of 5 planned tensors were not written: 'a', 'c', 'd'"
    assert refusal(run) == message
    assert names(tmp_path) == []


def test_files_are_partial_until_finish(tmp_path: Path) -> None:
    layout = plan_shards([TensorSpec(name, U8, (1,)) for name in "ab"], 1)
    with ShardWriter(tmp_path, layout) as writer:
        partials = [f"{shard.file_name}.partial" for shard in layout.shards]
        assert names(tmp_path) == partials
        assert [(tmp_path / name).stat().st_size for name in partials] == [
            shard.size for shard in layout.shards
        ]
        writer.write_raw("b", [b"2"])
        writer.write_raw("a", [b"1"])
        assert names(tmp_path) == partials
        writer.finish()
        finished = names(tmp_path)
    assert names(tmp_path) == finished
    assert finished == [*(s.file_name for s in layout.shards), "model.safetensors.index.json"]


def test_leaving_early_removes_the_partial_files_alone(tmp_path: Path) -> None:
    (tmp_path / "other.partial").write_text("")
    layout = plan_shards([TensorSpec(name, U8, (1,)) for name in "ab"], 1)

    def run() -> None:
        with ShardWriter(tmp_path, layout):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert names(tmp_path) == ["other.partial"]
    with ShardWriter(tmp_path, layout):
        pass
    assert names(tmp_path) == ["other.partial"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.partial"])
def test_existing_files_are_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=rf"{name}: it exists already, remove it first\Z"):
        ShardWriter(tmp_path, plan_shards([TensorSpec("a", U8, (1,))], 1))
    assert (tmp_path / name).read_text() == "precious"


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.partial").symlink_to(elsewhere)
    with pytest.raises(OutputError, match=r"^cannot write [^\n]*partial: File exists\Z"):
        ShardWriter(folder, plan_shards([TensorSpec("a", U8, (1,))], 1))
    assert names(tmp_path) == ["folder"]


def test_a_failed_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model-00002-of-00002.safetensors").write_text("precious")
    with pytest.raises(OutputError):
        ShardWriter(tmp_path, plan_shards([TensorSpec(name, U8, (1,)) for name in "ab"], 1))
    assert names(tmp_path) == ["model-00002-of-00002.safetensors"]


def test_missing_folder(tmp_path: Path) -> None:
    layout = plan_shards([TensorSpec("a", U8, (1,))], 1)
    with pytest.raises(
        OutputError, match=r"^cannot write [^\n]*model.safetensors.partial: No such[^\n]*\Z"
    ):
        ShardWriter(tmp_path / "gone", layout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    layout = plan_shards([TensorSpec("a", U8, (9,))], 1)

    def run() -> None:
        with ShardWriter(tmp_path, layout) as writer:
            (tmp_path / "model.safetensors.partial").unlink()
            (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")
            writer.write("a", torch.ones(9, dtype=U8))

    with pytest.raises(
        OutputError, match=r"^cannot write [^\n]*model.safetensors.partial: No space[^\n]*\Z"
    ):
        run()
    assert names(tmp_path) == []


def test_a_partial_file_that_vanished(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, plan_shards([TensorSpec("a", U8, (1,))], 1)) as writer:
        writer.write_raw("a", [b"1"])
        (tmp_path / "model.safetensors.partial").unlink()
        with pytest.raises(OutputError, match=r"^cannot write [^\n]*partial: No such[^\n]*\Z"):
            writer.finish()


TENSORS = st.lists(
    st.tuples(
        st.sampled_from(sorted(TORCH_DTYPES)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


def random_tensor(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    torch_dtype = TORCH_DTYPES[dtype]
    spec = TensorSpec("", torch_dtype, shape)
    top = 2 if torch_dtype == torch.bool else 256
    data = torch.randint(0, top, (spec.nbytes,), dtype=U8, generator=generator)
    return data.view(torch_dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.integers(1, 600), st.randoms(use_true_random=False))
def test_round_trip(
    drawn: list[tuple[str, tuple[int, ...]]], limit: int, rng: random.Random
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{i}.\u00e9{dtype}": random_tensor(dtype, shape, generator)
        for i, (dtype, shape) in enumerate(drawn)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, tensors, rng.sample(list(tensors), len(tensors)), limit)
        loaded: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            loaded.update(load_file(path))
            infos = read_header(path).values()
            assert all(info.start % TORCH_DTYPES[info.dtype].itemsize == 0 for info in infos)
            assert len(infos) == 1 or sum(info.nbytes for info in infos) <= limit
        with open_reader(folder) as reader:
            ours = {name: reader.read(name) for name in reader.index.tensors}
    for result in (loaded, ours):
        assert set(result) == set(tensors)
        for name, tensor in tensors.items():
            assert (result[name].dtype, result[name].shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(result[name]) == bytes_of(tensor)
