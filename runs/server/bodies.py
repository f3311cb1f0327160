"""What clients send, checked: bodies of `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Parameters that would change the answer and that this server does not have, and the values that ask for nothing."""


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


class StreamOptions(BaseModel):
    """What a stream says of usage: at its end, and with every chunk."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(BaseModel):
    """What both kinds of request have. Parameters that nobody knows are ignored: clients send new ones all the time."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = None
    """None: the one that is served."""
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], FirstMistake] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS:
            raise ValueError(f"{len(stops)} stop strings; at most {MOST_STOPS} are watched for")
        if any(not 1 <= len(one) <= MOST_STOP_CHARACTERS for one in stops):
            raise ValueError(f"a stop string must have 1 to {MOST_STOP_CHARACTERS} characters")
        return stop

    @model_validator(mode="after")
    def _asks_for_what_there_is(self) -> Body:
        for name, neutral in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and not any(value == one and isinstance(value, type(one)) for one in neutral):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of streams; set stream to true, or leave them out")
        if self.min_tokens and not (self.ignore_eos and not self.stops):
            raise ValueError("min_tokens needs ignore_eos=true and no stop here: then every output has its max_tokens")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage(self) -> StreamOptions:
        """What a stream says of usage."""
        return self.stream_options or StreamOptions()


class CompletionBody(Body):
    """A text, or token ids, to go on with."""

    prompt: (
        Text
        | Annotated[list[Text], FirstMistake]
        | Annotated[list[int], FirstMistake]
        | Annotated[list[Annotated[list[int], FirstMistake]], FirstMistake]
    )

    @property
    def text_or_tokens(self) -> str | list[int]:
        """The prompt. Raises ValueError for several of them."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} prompts; send one request for each")
            return prompt[0]
        return [token for token in prompt if isinstance(token, int)]


class TextPart(BaseModel):
    """A part of a message; others than text are refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], FirstMistake]

    @property
    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(Body):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1), FirstMistake]
    max_completion_tokens: Positive | None = None
    """In place of `max_tokens`, which OpenAI has given up for chats."""
