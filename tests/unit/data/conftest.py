from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TRAINING_LINES = [
    "the quick brown fox jumps over the lazy dog",
    "a row is the start of a document of at least so many tokens",
    "documents are joined end to end and cut into rows",
    "user assistant system tool content role",
] * 5
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'narrator' %}{{ raise_exception('no narrators here') }}{% endif -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{% if message.content is string %}{{ message.content }}{% endif -%}
{% for call in message.tool_calls or [] -%}
{% for key, value in call.function.arguments | items %}[{{ key }}={{ value }}]{% endfor -%}
{% endfor %}<|im_end|>
{% endfor -%}
"""


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML tokens that thinks 32 tokens are much."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", model_max_length=32
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return _make_tokenizer()


@pytest.fixture
def marking_tokenizer() -> PreTrainedTokenizerBase:
    """Puts <|im_start|> before a text by itself."""
    tokenizer = _make_tokenizer()
    start = ("<|im_start|>", SPECIALS.index("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[start]
    )
    return tokenizer


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    """No chat template, no eos token, no end-of-text token."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
