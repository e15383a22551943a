"""Gemma 3, dense: sliding-window and full attention 5 : 1, scaled embeddings, four norms a block.

Both the vision-language wrapper (``model.language_model.*``, ``model.vision_tower.*``,
``model.multi_modal_projector.*``) and the text-only form (``model.*``) are known.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

from nybble.arch.dense import decoder, known_values
from nybble.arch.spec import Architecture, Config, KeepRule
from nybble.core.errors import CheckpointError, UnsupportedArchitecture

_VISION_RULES = (
    KeepRule(r"model\.vision_tower\..+", "vision", "vision tower"),
    KeepRule(r"model\.multi_modal_projector\..+", "vision", "projector of the vision tower"),
)
_UNSUPPORTED = {
    "final_logit_softcapping": "logits are the plain product with the output head",
    "use_bidirectional_attention": "rows are calibrated and measured as causal text",
}


def architecture(config: Config) -> Architecture:
    """Reads config.json of either form; raises whatever a broken value makes of it."""
    values = known_values(config)
    is_wrapper = "text_config" in config
    whole = Gemma3Config(**values) if is_wrapper else Gemma3TextConfig(**values)
    text_config = whole.text_config if isinstance(whole, Gemma3Config) else whole
    assert isinstance(text_config, Gemma3TextConfig)
    tied = bool(text_config.tie_word_embeddings)
    if tied != bool(whole.tie_word_embeddings):
        raise CheckpointError(
            f"config.json has tie_word_embeddings {not tied} outside its text_config and {tied} "
            "inside (true where nothing is said): engines read one or the other, so say the same "
            "in both"
        )
    for key, reason in _UNSUPPORTED.items():
        if getattr(text_config, key):
            raise UnsupportedArchitecture(
                f"config.json has {key} {getattr(text_config, key)!r}, which is not supported for "
                f"Gemma 3: {reason}"
            )
    return decoder(
        name="gemma3",
        text_config=text_config,
        text_prefix="model.language_model." if is_wrapper else "model.",
        tied=tied,
        build_text_model=partial(_build_text_model, text_config),
        more_rules=_VISION_RULES if is_wrapper else (),
        embedding_scale=text_config.hidden_size**0.5,
    )


def _build_text_model(text_config: Gemma3TextConfig) -> Gemma3TextModel:
    model = Gemma3TextModel(text_config)
    # A buffer that no checkpoint stores: on the meta device its value would be lost. As a scalar
    # on the CPU it multiplies embeddings on any device.
    scale = torch.tensor(text_config.hidden_size**0.5, device="cpu")
    model.embed_tokens.embed_scale = nn.Buffer(scale, persistent=False)
    return model
