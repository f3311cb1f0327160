"""What clients send, checked: bodies of `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from runs.server.errors import about
from runs.server.parameters import unsupported
from runs.server.text import Chat, Side

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_BAD_WORDS = 64
MOST_BIASED = 1024

TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
"""What chat templates may read of a message beside its role and content."""
HARMLESS_IN_MESSAGES = frozenset(("annotations", "id", "object", "status"))

RESERVED_VARIABLES = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    )
)
"""Variables of chat templates that are not a client's to set by `chat_template_kwargs`."""


def _whole(text: str) -> str:
    """JSON may spell half a surrogate pair, which no tokenizer and no answer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
FirstMistake = Field(fail_fast=True)
"""Lists are read up to their first mistake: a list of mistakes would be as long as the client likes."""
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Word = Annotated[Text, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class StreamOptions(BaseModel):
    """What a stream says of usage: at its end, and with every chunk."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(BaseModel):
    """What both kinds of request have. `runs.server.parameters` says what becomes of other parameters."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = None
    """None: the one that is served."""
    max_tokens: Count | None = None
    max_completion_tokens: Positive | None = None
    """In place of `max_tokens`, which OpenAI has given up for chats."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: int | None = None
    """No other than n: none of several answers is chosen here."""
    stop: Text | Annotated[list[Text], FirstMistake] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_BIASED), FirstMistake] | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """-1: to what the context has room for."""
    truncation_side: Side | None = None
    allowed_token_ids: Annotated[list[Token], Field(min_length=1), FirstMistake] | None = None
    bad_words: Annotated[list[Word], Field(max_length=MOST_BAD_WORDS), FirstMistake] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASED)] | None = (
        None
    )
    """By token id."""
    echo: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS:
            raise ValueError(f"{len(stops)} stop strings; at most {MOST_STOPS} are watched for")
        if any(not 1 <= len(one) <= MOST_STOP_CHARACTERS for one in stops):
            raise ValueError(f"a stop string must have 1 to {MOST_STOP_CHARACTERS} characters")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _by_token(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if any(not (key.isascii() and key.isdigit() and len(key) < 10) for key in bias or ()):
            raise ValueError("its keys are token ids in digits")
        return bias

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _leaves_something(cls, most: int | None) -> int | None:
        if most == 0:
            raise ValueError("0 leaves no prompt; send 1 or more, or -1 for what the context has room for")
        return most

    @model_validator(mode="after")
    def _asks_for_what_there_is(self) -> Body:
        if refused := unsupported(self.model_extra or {}):
            raise about(*refused)
        if self.best_of not in (None, self.n or 1):
            raise about("best_of", "best_of is not supported by this server; n asks for several answers")
        if self.stream_options is not None and not self.stream:
            raise about("stream_options", "stream_options are of streams; set stream to true, or leave them out")
        if self.max_tokens == 0 and not self.max_completion_tokens and not self.returns_prompts_only:
            raise about("max_tokens", "max_tokens: must be greater than or equal to 1; 0 is for echo=true")
        most = self.max_completion_tokens or self.max_tokens
        if self.min_tokens and most is not None and self.min_tokens > most:
            raise about("min_tokens", f"min_tokens={self.min_tokens} is more than max_tokens={most}")
        return self

    @property
    def returns_prompts_only(self) -> bool:
        """Whether nothing that is generated is sent back."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """The most probable tokens whose log probabilities are wanted beside those of the output; None: none at all."""
        return None

    @property
    def bias(self) -> dict[int, float]:
        """What is added to the logits of token ids."""
        return {int(key): value for key, value in (self.logit_bias or {}).items()}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage(self) -> StreamOptions:
        """What a stream says of usage."""
        return self.stream_options or StreamOptions()


class CompletionBody(Body):
    """Texts, or token ids, to go on with."""

    prompt: (
        Text
        | Annotated[list[Text], FirstMistake]
        | Annotated[list[int], FirstMistake]
        | Annotated[list[Annotated[list[int], FirstMistake]], FirstMistake]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    @property
    def returns_prompts_only(self) -> bool:
        """See `Body.returns_prompts_only`."""
        return bool(self.echo) and self.max_tokens == 0 and self.max_completion_tokens is None

    @property
    def num_logprobs(self) -> int | None:
        """See `Body.num_logprobs`."""
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message; others than text are refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    type: Literal["text"]
    text: Text


class FunctionCall(BaseModel):
    """A function that the assistant called, and its arguments: an object, or JSON of one."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    name: Text
    arguments: Text | dict[str, Any] = ""

    @field_validator("arguments")
    @classmethod
    def _parsed(cls, arguments: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(arguments, dict):
            return arguments
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


class ToolCall(BaseModel):
    """A call of a tool by the assistant."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A turn of a conversation. Whatever else a message says is refused, but for what a client got with an answer."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], FirstMistake] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FirstMistake] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS_IN_MESSAGES and value not in (None, "", [], {}):
                raise ValueError(f"{name[:64]} is not supported in messages; leave it out")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are of assistant messages, and this is one of role {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an assistant message with tool_calls can do without")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: content is text, and what was not sent is not there."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        rest = self.model_dump(include=set(TEMPLATE_KEYS), exclude_none=True)
        return {"role": self.role, "content": text} | {name: value for name, value in rest.items() if value != []}


class ChatBody(Body):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1), FirstMistake]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_ours(cls, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        if reserved := sorted(RESERVED_VARIABLES.intersection(variables or ())):
            raise ValueError(f"{reserved[0]} is not to be set here")
        return variables

    @model_validator(mode="after")
    def _goes_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise about("top_logprobs", "top_logprobs needs logprobs=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise about("continue_final_message", "continue_final_message excludes add_generation_prompt=true")
        if self.continue_final_message and not self.messages[-1].plain["content"]:
            raise about("continue_final_message", "the last message has no content to be continued")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `Body.num_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chat(self) -> Chat:
        """The conversation as the chat template is to render it."""
        continues = bool(self.continue_final_message)
        begins = not continues and self.add_generation_prompt is not False
        return Chat([message.plain for message in self.messages], begins, continues, self.chat_template_kwargs or {})
