"""Bodies of OpenAI's requests, with vLLM's names for settings that OpenAI does not have."""

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qlora_jax.inference.engine.request import LIKELIEST
from qlora_jax.server.request_validation import ANY, Body, Fields
from qlora_jax.untrusted_json import JsonObject

MOST_LIKELY = 20  # tokens whose log-probabilities a chat may ask for
MOST_SCORES = 1 << 20  # log-probabilities of prompts in one response, which takes about 200 bytes for each
MOST_CHOICES = 64
MOST_PROMPTS = 2048

type Bias = Annotated[float, Field(ge=-100, le=100)]
type Biases = Annotated[dict[Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,8})$")], Bias], Field(max_length=1024)]
type Penalty = Annotated[float, Field(ge=-2, le=2)]
type Likeliest = Annotated[int, Field(ge=0, le=MOST_LIKELY)]
type Count = Annotated[int, Field(ge=1, lt=2**31)]
type Id = Annotated[int, Field(ge=0, lt=2**31)]
type FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
type Text = Annotated[str, Field(min_length=1)]
type Stops = Text | Annotated[list[Text], Field(max_length=16)]
type Nothing = Annotated[list[object], Field(max_length=0)]

# Fields that are not implemented, or that only describe the request, and the values that change nothing.
_INERT: Mapping[str, Collection[object]] = {
    "user": (ANY,),
    "metadata": (ANY,),
    "safety_identifier": (ANY,),
    "prompt_cache_key": (ANY,),
    "prompt_cache_retention": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (),
    "spaces_between_special_tokens": (),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "priority": (0,),
}


class StreamOptions(Fields):
    """The field `stream_options`."""

    include_usage: bool = False


class StructuredOutputs(Fields):
    """vLLM's field `structured_outputs`: one of these restricts the reply."""

    json_: JsonObject | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None


class SampledBody(Body):
    """The fields of requests that draw tokens."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    return_token_ids: bool = False
    structured_outputs: StructuredOutputs | None = None


class TextPart(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Fields):
    """A call in a message of the assistant."""

    name: FunctionName
    arguments: str


class ToolCall(Fields):
    """An element of `tool_calls`."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    """An element of `messages`; the last four fields are those of replies that clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing | None = None


class Function(Fields):
    """The function of a tool."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Fields):
    """An element of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """The function of a choice."""

    name: FunctionName


class NamedTool(Fields):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Fields):
    """The schema of a response format."""

    name: str
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The field `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SampledBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Likeliest | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | list[str]] = Field(default_factory=dict)
    reasoning_effort: str | None = None

    inert: ClassVar[Mapping[str, Collection[object]]] = {
        **_INERT,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "verbosity": (),
        "web_search_options": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": (),
        "chat_template": (),
        "include_reasoning": (True,),
        "return_tokens_as_token_ids": (False,),
    }


class CompletionBody(SampledBody):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str] | list[Id] | list[list[Id]], Field(min_length=1, max_length=1 << 20)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST[-1])] | None = None
    return_tokens_as_token_ids: bool = False
    response_format: ResponseFormat | None = None

    inert: ClassVar[Mapping[str, Collection[object]]] = {**_INERT, "suffix": ("",), "add_special_tokens": (True,)}


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    encoding_format: Literal["float", "base64"] = "float"

    inert: ClassVar[Mapping[str, Collection[object]]] = {
        "user": (ANY,),
        "dimensions": (),
        "truncate_prompt_tokens": (),
        "add_special_tokens": (True,),
        "priority": (0,),
    }


class LoadAdapterBody(Body):
    """The body of /v1/load_lora_adapter; `lora_path` names a folder in that of the setting `adapters`."""

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    lora_path: str

    inert: ClassVar[Mapping[str, Collection[object]]] = {"load_inplace": (False,), "base_model_name": ()}


class UnloadAdapterBody(Body):
    """The body of /v1/unload_lora_adapter."""

    lora_name: str

    inert: ClassVar[Mapping[str, Collection[object]]] = {"lora_int_id": ()}
