"""Damages the JSON of a checkpoint again and again and has the doctor look at it.

    python doctor_fuzzing.py CHECKPOINT SCRATCH EXAMPLES

The last line printed is a JSON object: how many examples, how many were flagged or refused, the
peak of resident memory, and whether torch was imported. Any exception but CheckpointError, and
any example that takes longer than SECONDS, ends it with status 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nybble.checkpoint.headers import LENGTH_BYTES
from nybble.core.errors import CheckpointError
from nybble.doctor.check import check_checkpoint

SECONDS = 5
"""Of one example, on a machine that may be busy; 0.05 otherwise."""
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "re:.*", "-:.*mtp.*", "model.layers", ".*(a+)+$", "../x", "bfloat16"])
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every node of a JSON value."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found += paths_in(inner, (*path, number))
    return found


def changed(value: Any, path: tuple[Any, ...], edit: Callable[[Any, Any], None]) -> Any:
    """A copy of a JSON value, one node of it edited."""
    copy = json.loads(json.dumps(value))
    node = copy
    for key in path[:-1]:
        node = node[key]
    edit(node, path[-1])
    return copy


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON text with one to three nodes replaced, dropped or renamed, or with bytes missing."""
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in paths_in(value) if path]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        how = draw(st.sampled_from(["replace", "drop", "rename"]))
        new = draw(JSON_VALUES)
        name = draw(st.text(max_size=10))

        def edit(node: Any, key: Any, how: str = how, new: Any = new, name: str = name) -> None:
            if how == "replace":
                node[key] = new
            else:
                old = node.pop(key)
                if how == "rename" and isinstance(node, dict):
                    node[name] = old

        value = changed(value, path, edit)
    text = json.dumps(value).encode()
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    return text


def main() -> int:
    """Runs the examples."""
    source, scratch, examples = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    files = {path.name: path for path in source.iterdir() if path.is_file()}
    originals = {name: json_of(path) for name, path in files.items() if has_json(name)}
    counts = {"examples": 0, "flagged": 0}
    for name, path in files.items():
        (scratch / name).write_bytes(path.read_bytes())

    @settings(
        max_examples=examples,
        deadline=SECONDS * 1000,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def look(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(originals)))
        text = data.draw(damaged(originals[name]))
        target = scratch / name
        target.write_bytes(with_body(files[name], text) if is_weights(name) else text)
        counts["examples"] += 1
        try:
            counts["flagged"] += not check_checkpoint(str(scratch)).is_clean
        except CheckpointError:
            counts["flagged"] += 1
        finally:
            target.write_bytes(files[name].read_bytes())

    look()
    print(json.dumps({**counts, "peak_rss_bytes": peak(), "has_torch": "torch" in sys.modules}))
    return 0


def is_weights(name: str) -> bool:
    """Whether it is a safetensors file."""
    return name.endswith(".safetensors")


def has_json(name: str) -> bool:
    """Files that the doctor reads as JSON, weights for their headers."""
    return is_weights(name) or (name.endswith(".json") and not name.startswith("tokenizer"))


def json_of(path: Path) -> Any:
    """A file's JSON, of weights the header."""
    data = path.read_bytes()
    if is_weights(path.name):
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        data = data[LENGTH_BYTES : LENGTH_BYTES + length]
    return json.loads(data)


def with_body(path: Path, header: bytes) -> bytes:
    """Weights under another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + data[LENGTH_BYTES + length :]


def peak() -> int:
    """Largest resident set of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
