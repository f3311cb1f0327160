"""Parameters that clients send and this server does not have: those that change no answer, and those that would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    (
        "cache_salt",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "user",
    )
)
"""Ignored whatever they say: they decide neither what is generated nor what is sent back of it."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "documents": ([],),
    "early_stopping": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "min_p": (0, 0.0),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0, 0.0),
    "priority": (0,),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Values that ask for nothing, of parameters that would change the answer. Null always asks for nothing."""

INSTEAD: Mapping[str, str] = {
    "chat_template": "the server has one (its key chat_template); chat_template_kwargs sets a template's variables",
    "reasoning_effort": "a template that knows it takes it in chat_template_kwargs",
    "prompt_embeds": "send prompt as text or token ids",
}
"""What to do in place of sending a parameter."""


def unsupported(extra: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, message) of the first of these parameters that asks for something; None: none does."""
    for name, value in extra.items():
        if value is None or name in HARMLESS or _asks_for_nothing(value, NEUTRAL.get(name, ())):
            continue
        shown = name if len(name) <= 64 else f"{name[:64]}..."
        return shown, f"{shown} is not supported by this server; {INSTEAD.get(name, 'leave it out')}"
    return None


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in neutral)
