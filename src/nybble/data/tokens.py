"""A document's token ids: plain text as it is, a conversation through the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nybble.core.errors import DataError
from nybble.data.documents import Conversation, Document, PlainText, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
KEEP_THINKING: Mapping[str, bool] = MappingProxyType(
    {
        "preserve_thinking": True,  # Qwen3.6, Kimi K2
        "clear_thinking": False,  # GLM
        "truncate_history_thinking": False,  # Nemotron, Granite
    }
)
"""What chat templates call the switch that keeps the thinking of turns before the last question.

Unset, most of them drop it. A template ignores the names that it does not know; one without any
switch (Qwen3, Qwen3.5) drops that thinking always, in calibration as in use.
"""
_THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THINKING_END = "</think>"


def tokenized(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's token ids: all of them, however long the tokenizer's model_max_length.

    Plain text gets the special tokens that the tokenizer adds by itself; a rendered conversation
    does not, as its template writes them. A conversation that holds thinking is rendered with
    ``KEEP_THINKING``. Any other is rendered as the template does by itself, since with the switch
    on, Qwen3.6's writes an empty thought into every turn that has none.

    Raises DataError if a conversation cannot be rendered, or for text that UTF-8 cannot hold.
    """
    is_plain = isinstance(document, PlainText)
    text = document.text if isinstance(document, PlainText) else _rendered(document, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.where}: character {error.start + 1} is half of a surrogate pair: "
            "repair the text or take it out"
        ) from error
    # verbose=False: a text longer than model_max_length is no news here, rows are cut from it.
    encoding = tokenizer(text, add_special_tokens=is_plain, verbose=False)
    ids: list[int] = encoding["input_ids"]
    return ids


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that parts documents: of ``<|endoftext|>``, or else of the eos token.

    Raises DataError if the tokenizer has neither.
    """
    found: int | None = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise DataError(
            f"the tokenizer has no {END_OF_TEXT} and no eos token to put between documents: "
            'use layout = "truncate" or "pad"'
        )
    return found


def _rendered(document: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: a conversation, and the tokenizer has no chat template: "
            "give plain text"
        )
    tools: list[dict[str, Any] | Callable[..., Any]] | None = None
    if document.tools is not None:
        tools = [dict(tool) for tool in document.tools]
    messages = [dict(message) for message in document.messages]
    switches: dict[str, Any] = {}
    if any(map(_holds_thinking, messages)):
        switches.update(KEEP_THINKING)
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **switches))
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"{document.where}: the tokenizer's chat template refuses it: {first_line(error)}"
        ) from error


def _holds_thinking(message: Mapping[str, Any]) -> bool:
    if any(message.get(field) for field in _THINKING_FIELDS):
        return True
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return any(_THINKING_END in text for text in texts)
