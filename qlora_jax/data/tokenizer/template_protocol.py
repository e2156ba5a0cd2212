"""Limits on the rendering of chat templates, and the messages between template_process.py and template_worker.py.

A request is a pickle of (template, variables, calls), where the calls are a pickle of groups: lists of lists with
the fields of a Rendering each. A reply has a HEADER, a byte for each text (1 for an error), the texts' lengths as
64-bit integers, and the texts.
"""

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

Message = Mapping[str, Any]  # a JSON object: `content` is text, but `tool_calls` is a list, and templates read more
Tool = Mapping[str, object]  # the JSON schema of a function that the model may call

HEADER = struct.Struct("<QQ")  # the number of texts, and their bytes
LENGTHS = "Q"  # type code of an array
ENCODING = "utf-8", "surrogatepass"  # halves of surrogate pairs are reported later, with their row
STRFTIME_NOW = "strftime_now"  # the function with which a template writes the date; a request has a date for it
MEMORY_REACHED, OUTPUT_REACHED = 3, 4  # exit statuses of the worker
OUTPUT_PER_INPUT = 4  # characters that may be written per byte of the conversations


class Limits(NamedTuple):
    """Limits on one rendering.

    Fields:
      seconds: processor time.
      memory: bytes of the worker, including Python itself.
      output: characters, in addition to the template's length and OUTPUT_PER_INPUT for each byte of the conversations.
    """

    seconds: float = 1.0
    memory: int = 768 << 20
    output: int = 64 << 10
