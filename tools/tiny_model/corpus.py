"""Training text for the tiny model: code, prose and chat, all from the standard library.

Chat turns are made from docstrings (questions about functions, with thinking, with tool calls)
and from small sums, rendered by the model's own chat template.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]  # no stubs exist

from nybble.data.stdlib import Split, documents, source_files, split_of, stdlib_root

LOOKUP_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Find the documentation of a Python name.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


def code(split: Split) -> list[str]:
    """Library sources, and for training also CPython's own tests where they are installed."""
    texts = list(documents(split))
    if split == "train":
        tests = sorted((stdlib_root() / "test").rglob("*.py"))
        small = [path for path in tests if path.stat().st_size < 200_000]
        texts += [path.read_text(encoding="utf-8", errors="replace") for path in small]
    return texts


def prose(split: Split) -> list[str]:
    """The language reference as pydoc carries it."""
    return [text for name, text in topics.items() if split_of(name) == split]


def conversations(split: Split, seed: int) -> Iterator[dict[str, object]]:
    """Keyword arguments of ``apply_chat_template``, one conversation each."""
    rng = random.Random(seed)
    for path in source_files(split):
        for name, signature, doc in _documented_functions(path):
            yield _about_function(rng, name, signature, doc)
            if rng.random() < 0.3:
                yield _sum(rng)


def _documented_functions(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            first = doc.split("\n\n")[0].replace("\n", " ")
            if len(first) < 300:
                signature = f"{node.name}({ast.unparse(node.args)})"
                yield f"{path.stem}.{node.name}", signature, first


def _about_function(rng: random.Random, name: str, signature: str, doc: str) -> dict[str, object]:
    kind = rng.random()
    if kind < 0.3:
        return _chat(f"What does {name} do?", doc)
    if kind < 0.5:
        thought = f"The user asks about {name}. Its signature is {signature}."
        return _chat(f"Explain {name}.", doc, thought)
    if kind < 0.75:
        return _chat(f"Which arguments does {name} take?", f"```python\n{signature}\n```")
    call = {"function": {"name": "lookup", "arguments": {"name": name}}}
    return {
        "conversation": [
            {"role": "user", "content": f"Look up {name}."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps({"signature": signature, "doc": doc})},
            {"role": "assistant", "content": doc},
        ],
        "tools": [LOOKUP_TOOL],
    }


def _sum(rng: random.Random) -> dict[str, object]:
    a, b = rng.randrange(100), rng.randrange(100)
    if rng.random() < 0.5:
        return _chat(f"What is {a} + {b}?", f"{a} + {b} = {a + b}")
    return _chat(f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}")


def _chat(question: str, answer: str, thought: str = "") -> dict[str, object]:
    reply = {"role": "assistant", "content": answer, "reasoning_content": thought}
    return {"conversation": [{"role": "user", "content": question}, reply]}
