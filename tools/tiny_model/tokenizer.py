"""Trains the tiny model's tokenizer: byte-level BPE in Qwen3.5's form, 2048 entries."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

VOCAB_SIZE = 2048
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# As in Qwen3.5 these are single tokens but not "special": decoding keeps them.
MARKERS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """Trains on ``texts``, adds the special tokens and the chat template, saves to ``out``."""
    added = SPECIAL + MARKERS
    backend: Tokenizer = Qwen3_5Tokenizer().backend_tokenizer
    backend.model = BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(added),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return tokenizer
