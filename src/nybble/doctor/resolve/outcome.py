"""What ends the reading of a declaration early, and the reading itself done once per engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nybble.doctor.engines import Engine
from nybble.doctor.resolve.built import NotAnalysed, Refusal
from nybble.doctor.resolve.method import Context

Read = TypeVar("Read")


class EarlyEnd(Exception):
    """Nothing more can be said of the declaration, or of the module, than ``outcome``."""

    def __init__(self, outcome: Refusal | NotAnalysed) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def refused(engine: Engine, exception: str, message: str, file: str) -> EarlyEnd:
    """The engine raises ``exception``; ``file`` is where it does so."""
    return EarlyEnd(Refusal(exception, message, f"{engine.label}, {file}"))


def not_analysed(why: str) -> EarlyEnd:
    """No rule is known."""
    return EarlyEnd(NotAnalysed(why))


def once_per_context(
    read: Callable[[Context], Read],
) -> Callable[[Context], Read | Refusal | NotAnalysed]:
    """``read`` with its last answer, or its EarlyEnd's outcome, remembered.

    A simulation asks for every module in turn with one and the same context.
    """
    last: list[tuple[Context, Read | Refusal | NotAnalysed]] = []

    def remembered(context: Context) -> Read | Refusal | NotAnalysed:
        if not last or last[0][0] is not context:
            answer: Read | Refusal | NotAnalysed
            try:
                answer = read(context)
            except EarlyEnd as end:
                answer = end.outcome
            last[:] = [(context, answer)]
        return last[0][1]

    return remembered
