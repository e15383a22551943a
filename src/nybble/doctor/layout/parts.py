"""Collects what a layout is made of, tensor by tensor."""

from __future__ import annotations

from nybble.core.errors import CheckpointError
from nybble.doctor.layout.spec import LM_HEAD, Linear, part_of

MAX_LINEARS = 250_000
"""Twice what the largest published mixture has; beyond it a config is absurd, not a model."""


class Parts:
    """Tensors, Linears and stacks, in the order in which they are added.

    Linears that engines fuse follow each other in the order in which they are fused.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.linears: dict[str, Linear] = {}
        self.stacks: dict[str, tuple[str, ...]] = {}

    def tensor(self, name: str, *shape: int) -> None:
        """A tensor that is no Linear's."""
        self.tensors[name] = shape

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        """The weight of a norm, and its bias."""
        self.tensors[f"{name}.weight"] = (size,)
        if bias:
            self.tensors[f"{name}.bias"] = (size,)

    def linear(self, name: str, outs: int, ins: int, bias: bool = False) -> None:
        """A Linear [outs, ins]; raises CheckpointError if there are too many."""
        self.module(name, outs, ins)
        self.tensors[f"{name}.weight"] = (outs, ins)
        if bias:
            self.tensors[f"{name}.bias"] = (outs,)

    def module(self, name: str, outs: int, ins: int) -> None:
        """A Linear whose weights are listed elsewhere; raises CheckpointError as ``linear``."""
        self._refuse_beyond(1)
        self.linears[name] = Linear(name, (outs, ins), part_of(name))

    def gated_mlp(self, name: str, hidden: int, inner: int, bias: bool = False) -> None:
        """``down(act(gate(x)) * up(x))``; raises CheckpointError as ``linear``."""
        self.linear(f"{name}.gate_proj", inner, hidden, bias)
        self.linear(f"{name}.up_proj", inner, hidden, bias)
        self.linear(f"{name}.down_proj", hidden, inner, bias)

    def head(self, vocabulary: int, hidden: int, stored: bool, built: bool) -> None:
        """The output head: as a tensor if it is stored, as a Linear if some engine builds it."""
        if built:
            self.module(LM_HEAD, vocabulary, hidden)
        if stored:
            self.tensor(f"{LM_HEAD}.weight", vocabulary, hidden)

    def experts(self, owner: str, count: int, inner: int, hidden: int) -> None:
        """Gated MLPs, which a checkpoint holds as two stacks or one by one.

        Raises CheckpointError if there are too many.
        """
        self._refuse_beyond(3 * count)
        part, wide, narrow = part_of(owner), (inner, hidden), (hidden, inner)
        stacks: tuple[list[str], list[str]] = ([], [])
        for expert in range(count):
            gate, up, down = (f"{owner}.{expert}.{leaf}_proj" for leaf in ("gate", "up", "down"))
            self.linears[gate] = Linear(gate, wide, part)
            self.linears[up] = Linear(up, wide, part)
            self.linears[down] = Linear(down, narrow, part)
            stacks[0].extend((gate, up))
            stacks[1].append(down)
        self.tensor(f"{owner}.gate_up_proj", count, 2 * inner, hidden)
        self.tensor(f"{owner}.down_proj", count, hidden, inner)
        self.stacks[f"{owner}.gate_up_proj"] = tuple(stacks[0])
        self.stacks[f"{owner}.down_proj"] = tuple(stacks[1])

    def _refuse_beyond(self, more: int) -> None:
        if len(self.linears) + more > MAX_LINEARS:
            raise CheckpointError(
                f"config.json describes a model of more than {MAX_LINEARS} Linears: that is none"
            )
