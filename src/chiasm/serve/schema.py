"""The request of OpenAI's chat completions: every number bounded, every field known, ignored by rule, or refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from chiasm.serve.errors import ApiError, shown
from chiasm.serve.options import Limits

MAX = 1_000_000  # no request for tokens is larger
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Choice = Annotated[str, Field(min_length=1, max_length=1024)]

# Fields that would change the answer and that this server cannot honour: they are refused unless they say nothing.
# Unknown fields are ignored, since OpenAI's clients add new ones often; so are hints and bookkeeping (user, metadata,
# store, service_tier, prediction, reasoning_effort, verbosity, prompt_cache_*, safety_identifier).
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "modalities": (None, ["text"]),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "web_search_options": (None,),
    "moderation": (None,),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "echo": (None, False),
    "prompt_logprobs": (None, 0, False),
    "prompt_embeds": (None,),
    "chat_template": (None,),  # a template from a request could say anything
    "chat_template_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "documents": (None, []),
    "logits_processors": (None, []),
}


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion. ``messages`` and ``tools`` are read by ``content`` and ``tools``."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    model: str = Field(max_length=512)
    messages: list[Any]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # Beyond OpenAI's, under the names that vLLM gives them.
    top_k: int | None = Field(default=None, ge=-1, le=MAX)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    min_tokens: int | None = Field(default=None, ge=0, le=MAX)
    ignore_eos: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    guided_json: dict[str, Any] | None = None
    guided_choice: Annotated[list[Choice], Field(max_length=256)] | None = None
    guided_regex: Annotated[str, Field(max_length=4096)] | None = None
    guided_grammar: Annotated[str, Field(max_length=65_536)] | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > 1024:  # before each of a million is found wrong
            raise ValueError("at most 1024 tokens can be biased")
        return values

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise ValueError("add_generation_prompt: false needs continue_final_message: true")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("a final message is either continued or followed by a new answer")
        return self

    @property
    def answers(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer; the newer of the two names wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts to stop at."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @classmethod
    def read(cls, values: dict[str, Any], limits: Limits) -> ChatRequest:
        """A checked request. Raises ApiError (400) that names the field."""
        refuse(values, REFUSED)
        try:
            request = cls.model_validate(values)
        except ValidationError as error:
            raise explained(error) from None
        if request.answers > limits.n:
            raise ApiError(400, f"n is {request.answers}; at most {limits.n} answers are given to one request", "n")
        if len(request.tools or []) > limits.tools:
            raise ApiError(400, f"{len(request.tools or [])} tools; at most {limits.tools} are taken", "tools")
        return request


def refuse(values: dict[str, Any], rules: dict[str, tuple[Any, ...]]) -> None:
    """Raises ApiError for a field that would change the answer and is not supported."""
    for name, silent in rules.items():
        if name in values and not any(values[name] == s and type(values[name]) is type(s) for s in silent):
            raise ApiError(400, f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")


def explained(error: ValidationError) -> ApiError:
    """The first thing that is wrong, with its place, without the whole of what was sent."""
    problem = error.errors(include_url=False, include_context=False)[0]
    first, *rest = [*problem["loc"], ""]
    place = str(first) + "".join(f"[{step}]" for step in rest[:2] if isinstance(step, int))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is missing"
    elif problem["type"] != "value_error":
        message = f"{message}, got {shown(problem['input'])}"
    return ApiError(400, f"{place}: {message}" if place else message, place or None)
