"""What config.json says of the model itself, where it can only be a slip."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nybble.core.errors import CheckpointError
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import LM_HEAD
from nybble.doctor.repair.draft import Draft, Patient

ACTION = "config"
BLOCK = "quantization_config"

_TEXT = "text_config"
_TIED = "tie_word_embeddings"
_MTP_LAYERS = "mtp_num_hidden_layers"
_KEYS = frozenset({_TIED, "vision_config"})
_TEXT_KEYS = frozenset({_TIED, "layer_types"})
"""What a quantizer has no business to change, and engines build the model from."""


def restored(patient: Patient) -> tuple[dict[str, Any], list[str]]:
    """config.json with what the base says of the model's parts, and the keys that differed.

    Without config.json it is the base's, less what that says of quantization. Raises
    CheckpointError if there is neither.
    """
    own = patient.snapshot.config
    base = patient.base.config if patient.base is not None else None
    if own is None and base is None:
        raise CheckpointError(
            f"{patient.snapshot.source.label}: config.json is missing or broken; give the base "
            "with --base"
        )
    if own is None:
        return {key: value for key, value in (base or {}).items() if key != BLOCK}, ["all of it"]
    if base is None or own.get("architectures") != base.get("architectures"):
        return dict(own), []
    result, differed = _like(own, base, _KEYS)
    text, other = own.get(_TEXT), base.get(_TEXT)
    if isinstance(text, dict) and isinstance(other, dict):
        result[_TEXT], within = _like(text, other, _TEXT_KEYS | _mtp_keys(other))
        return result, differed + [f"{_TEXT}.{key}" for key in within]
    result, more = _like(result, base, _mtp_keys(base))
    return result, differed + more


def agree_on_ties(draft: Draft) -> Draft:
    """Both levels of config.json say whether the head is the embedding: as what is stored does."""
    text = draft.config.get(_TEXT)
    if not draft.layout.ties_disagree or not isinstance(text, dict):
        return draft
    tied = f"{LM_HEAD}.weight" not in draft.entries
    config = {**draft.config, _TIED: tied, _TEXT: {**text, _TIED: tied}}
    return _with_config(draft, config, f"{_TIED} is {tied} at both levels, as what is stored")


def call_for_head(draft: Draft) -> Draft:
    """Has config.json call for an MTP head that is there but that it does not mention."""
    layers = {name.split(".")[2] for name in draft.entries if name.startswith("mtp.layers.")}
    if draft.layout.has_mtp or not layers:
        return draft
    config = {**draft.config, _MTP_LAYERS: len(layers)}
    text = draft.config.get(_TEXT)
    if isinstance(text, dict):
        config = {**draft.config, _TEXT: {**text, _MTP_LAYERS: len(layers)}}
    return _with_config(draft, config, f"{_MTP_LAYERS} is {len(layers)}, as what is stored")


def _with_config(draft: Draft, config: dict[str, Any], text: str) -> Draft:
    try:
        layout = layout_of(config)
    except CheckpointError as error:
        return draft.failed(f"config.json: {text} cannot be said: {error}")
    assert layout is not None  # the architecture is known
    return draft.mended(ACTION, f"config.json: {text}", config=config, layout=layout)


def _like(
    own: Mapping[str, Any], base: Mapping[str, Any], keys: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """``own`` with these keys as in ``base``, absent ones included, and those that differed."""
    differed = sorted(
        key for key in keys if own.get(key) != base.get(key) or (key in own) != (key in base)
    )
    result = {key: value for key, value in own.items() if key not in differed or key in base}
    return {**result, **{key: base[key] for key in differed if key in base}}, differed


def _mtp_keys(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(key for key in config if key.startswith("mtp_"))
