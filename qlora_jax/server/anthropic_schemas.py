"""Bodies of Anthropic's requests."""

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qlora_jax.server.openai_schemas import Count, FunctionName, Text
from qlora_jax.server.request_validation import ANY, Body, Fields
from qlora_jax.untrusted_json import JsonObject


class CacheControl(Fields):
    """A hint: beginnings of prompts are always shared here, and no answer depends on it."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Fields):
    """A block of text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class Block(Fields):
    """A block of a message's content; `type` says which fields it has."""

    type: Literal["text", "thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: FunctionName | None = None
    input: JsonObject | None = None
    tool_use_id: str | None = None
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    citations: None = None


class AnthropicMessage(Fields):
    """An element of `messages`."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Fields):
    """An element of `tools`."""

    type: Literal["custom"] = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: JsonObject
    cache_control: CacheControl | None = None


class ToolChoice(Fields):
    """The field `tool_choice`."""

    type: Literal["auto", "any", "none", "tool"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Fields):
    """The field `thinking`; a budget cannot be kept, so `enabled` is not one of its types."""

    type: Literal["adaptive", "disabled"]


class MessagesBody(Body):
    """The body of /v1/messages."""

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    max_tokens: Count
    system: str | list[TextBlock] | None = None
    stop_sequences: Annotated[list[Text], Field(max_length=16)] = Field(default_factory=list)
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    tools: Annotated[list[AnthropicTool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    inert: ClassVar[Mapping[str, Collection[object]]] = {
        "metadata": (ANY,),
        "service_tier": ("auto", "standard_only"),
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "inference_geo": (),
        "output_config": (),
        "output_format": (),
        "betas": ([],),
    }
