from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from nybble.core.errors import DataError
from nybble.data.documents import Conversation, Document, PlainText
from nybble.data.sources import open_source
from nybble.data.tokens import end_of_text_id, tokenized

CHAT = [{"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "jumps"}]
# As Qwen's: earlier thinking only with a switch (3.6), or never (3, 3.5); the thinking may stand
# in the content; arguments must be an object; a turn after the last question always has a thought.
QWEN_LIKE = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor -%}
{%- for m in messages -%}
<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% set content = m.content or '' -%}
{% set thought = m.reasoning_content or '' -%}
{% if m.role == 'assistant' and not m.reasoning_content and '</think>' in content -%}
{% set thought = content.split('</think>')[0].split('<think>')[-1] | trim -%}
{% set content = content.split('</think>')[-1] | trim -%}
{% endif -%}
{% if m.role == 'assistant' and (SWITCH or loop.index0 > last.user) -%}
<think>
{{ thought }}
</think>

{% endif -%}
{% if m.role == 'tool' %}<tool_response>{{ content }}</tool_response>
{%- else %}{{ content }}{% endif -%}
{% for call in m.tool_calls or [] -%}
<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments | items %}[{{ key }}={{ value }}]{% endfor -%}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
"""
PRESERVE = QWEN_LIKE.replace("SWITCH", "(preserve_thinking is defined and preserve_thinking)")
CLEAR = QWEN_LIKE.replace("SWITCH", "(clear_thinking is defined and not clear_thinking)")
DROPPING = QWEN_LIKE.replace("SWITCH", "false")


def test_plain_text_gets_the_tokenizers_own_special_tokens(
    tokenizer: PreTrainedTokenizerBase, marking_tokenizer: PreTrainedTokenizerBase
) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = tokenized(PlainText("", "the fox"), marking_tokenizer)
    assert plain == [start, *tokenizer("the fox")["input_ids"]]
    chat = Conversation("", tuple(CHAT))
    assert tokenized(chat, marking_tokenizer) == tokenized(chat, tokenizer)


def test_a_conversation_is_rendered_with_thinking_and_tools(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    messages = (
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": None, "reasoning_content": "ask", "tool_calls": [call]},
        {"role": "tool", "content": "fine"},
    )
    ids = tokenized(Conversation("", messages, ({"name": "f"},)), tokenizer)
    assert tokenizer.decode(ids) == (
        '<|im_start|>system\n[{"name": "f"}]<|im_end|>\n'
        "<|im_start|>user\nweather<|im_end|>\n"
        "<|im_start|>assistant\n<think>ask</think>[city=Rome]<|im_end|>\n"
        "<|im_start|>tool\nfine<|im_end|>\n"
    )


def _refusal(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    with pytest.raises(DataError) as caught:
        tokenized(document, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_conversation_needs_a_chat_template(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    assert _refusal(Conversation("a.jsonl: line 3", tuple(CHAT)), bare_tokenizer) == (
        "a.jsonl: line 3: a conversation, and the tokenizer has no chat template: give plain text"
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "narrator", "content": "once"}, "no narrators here"),
        (
            {"role": "user", "content": "", "tool_calls": [{"function": {"arguments": "no"}}]},
            "Can only get item pairs from a mapping.",
        ),
        ({"role": "user", "content": "", "tool_calls": [{}]}, ""),
    ],
)
def test_a_conversation_that_the_template_refuses(
    tokenizer: PreTrainedTokenizerBase, message: dict[str, Any], reason: str
) -> None:
    error = _refusal(Conversation("a.jsonl: line 3", (message,)), tokenizer)
    assert error.startswith(f"a.jsonl: line 3: the tokenizer's chat template refuses it: {reason}")


def test_half_a_surrogate_pair_is_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "fox\ud800"
    problem = "character 4 is half of a surrogate pair: repair the text or take it out"
    assert _refusal(PlainText("a.jsonl: line 3", text), tokenizer) == f"a.jsonl: line 3: {problem}"
    chat = Conversation("a.jsonl: line 3", ({"role": "user", "content": text},))
    assert "half of a surrogate pair" in _refusal(chat, tokenizer)


def test_documents_are_parted_by_end_of_text_or_else_eos(
    tokenizer: PreTrainedTokenizerBase, bare_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert end_of_text_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with pytest.raises(DataError, match=r"no <\|endoftext\|> and no eos token"):
        end_of_text_id(bare_tokenizer)
    bare_tokenizer.eos_token = "b"
    assert end_of_text_id(bare_tokenizer) == 1


# Thinking and tools through templates like those of the models

CALL = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}}
AGENT: list[dict[str, Any]] = [
    {"role": "user", "content": "warm in Rome?"},
    {"role": "assistant", "content": "", "reasoning_content": "look it up", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 degrees"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "21 is warm"},
    {"role": "user", "content": "and in Oslo?"},
    {"role": "assistant", "content": "No.", "reasoning_content": "it is far north"},
]
TOOL_TURNS = (
    "<|im_start|>user\nwarm in Rome?<|im_end|>\n"
    "<|im_start|>assistant\n{0}<tool_call>weather[city=Rome][days=2]</tool_call><|im_end|>\n"
    "<|im_start|>user\n<tool_response>21 degrees</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n{1}Yes.<|im_end|>\n"
    "<|im_start|>user\nand in Oslo?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nit is far north\n</think>\n\nNo.<|im_end|>\n"
)


def _rendered(
    messages: list[dict[str, Any]], template: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> str:
    """The messages written as a line of .jsonl, read, rendered, tokenized, and decoded."""
    path = folder / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    (document,) = open_source(str(path))
    tokenizer.chat_template = template
    text = tokenizer.decode(tokenized(document, tokenizer))
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", [PRESERVE, CLEAR])
def test_a_template_that_can_keep_earlier_thinking_keeps_it(
    template: str, marking_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert _rendered(AGENT, template, marking_tokenizer, tmp_path) == TOOL_TURNS.format(
        "<think>\nlook it up\n</think>\n\n", "<think>\n21 is warm\n</think>\n\n"
    )


def test_a_template_without_a_switch_drops_earlier_thinking_alone(
    marking_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rendered = _rendered(AGENT, DROPPING, marking_tokenizer, tmp_path)
    assert rendered == TOOL_TURNS.format("", "")


def test_thinking_within_the_content_is_kept_too(
    marking_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    messages = [
        {**message, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}
        if (thought := message.get("reasoning_content"))
        else message
        for message in AGENT
    ]
    for message in messages:
        message.pop("reasoning_content", None)
    assert "reasoning_content" in AGENT[1]
    kept = _rendered(messages, PRESERVE, marking_tokenizer, tmp_path)
    assert kept == _rendered(AGENT, PRESERVE, marking_tokenizer, tmp_path)
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
    seen = "{{ preserve_thinking is defined }} {{ clear_thinking is defined }}"
    assert _rendered(parts, seen, marking_tokenizer, tmp_path) == "True True"


def test_a_conversation_without_thinking_gets_no_empty_thoughts(
    marking_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    messages = [*CHAT, {"role": "user", "content": "and then"}, {**CHAT[1], "content": "rests"}]
    rendered = _rendered(messages, PRESERVE, marking_tokenizer, tmp_path)
    assert rendered.count("<think>") == 1  # the template's own, after the last question
    assert rendered == _rendered(messages, DROPPING, marking_tokenizer, tmp_path)


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_a_call_without_arguments(
    marking_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, arguments: object
) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    rendered = _rendered(messages, PRESERVE, marking_tokenizer, tmp_path)
    assert "<tool_call>now</tool_call>" in rendered
