"""Errors a user can act on. The command line prints one as a single line and exits with 2.

    NybbleError
    +-- RecipeError              (ValueError)  a recipe, an override or an option is not usable
    +-- CheckpointError          (ValueError)  a checkpoint on disk is broken or not of our kind
    +-- UnsupportedArchitecture  (ValueError)  no arch file knows this model
    +-- PlanError                (ValueError)  a tensor has no fate, or two
    +-- DataError                (ValueError)  calibration or evaluation text is not usable
    +-- QuantizationError        (ArithmeticError)  the numbers went wrong (NaN, infinity)
    +-- OutputError              (OSError)     the result cannot be written where it was asked for
    +-- EvaluationError          (RuntimeError)  a program that we started failed

A message says what was seen, where, and what to do. ``assert`` is only for our own invariants.
"""

from __future__ import annotations


class NybbleError(Exception):
    """Base of all errors that are the input's fault, not ours."""


class RecipeError(NybbleError, ValueError):
    """A recipe, an override or an option is not usable."""


class CheckpointError(NybbleError, ValueError):
    """A checkpoint on disk is broken or not of a kind we read."""


class UnsupportedArchitecture(NybbleError, ValueError):
    """No file in ``arch`` knows this model."""


class PlanError(NybbleError, ValueError):
    """A source tensor has no fate, or more than one."""


class DataError(NybbleError, ValueError):
    """Calibration or evaluation text is not usable."""


class QuantizationError(NybbleError, ArithmeticError):
    """A value that must be finite is not."""


class OutputError(NybbleError, OSError):
    """The result cannot be written where it was asked for."""


class EvaluationError(NybbleError, RuntimeError):
    """A program that was started for a measurement failed."""
