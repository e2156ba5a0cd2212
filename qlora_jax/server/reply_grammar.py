"""Writes calls in a template's format as a grammar, so that a model has to call a function."""

import json
import re
from collections.abc import Collection, Iterator, Sequence

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.grammar import Grammar
from qlora_jax.inference.reply_format import CALL_ID, CallFormat
from qlora_jax.inference.reply_reader import allows_text, alternatives, values_of
from qlora_jax.server.errors import bad_request
from qlora_jax.untrusted_json import JsonObject

_PLAIN = {"type", "title", "description", "default", "examples"}  # fields that restrict no text
ANY_OBJECT: JsonObject = {"type": "object"}
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # as templates write arguments


def call_grammar(
    form: CallFormat, tools: Sequence[JsonObject], required: Collection[str], *, single: bool, tokenizer: Tokenizer
) -> Grammar:
    """Returns the grammar of calls of the `required` functions, in a template's format."""
    functions = [tool["function"] for tool in tools if tool["function"]["name"] in required]
    several = "" if single or form.between is None else f" ({_literal(form.between, tokenizer)} call)*"
    lines = [f"start: {_literal(form.head, tokenizer)} call{several} {_literal(form.tail, tokenizer)}"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    for number, function in enumerate(functions):
        name, parameters = function["name"], function.get("parameters") or ANY_OBJECT
        if form.tags is None:
            before = _literal(f"{form.before_name}{name}{form.before_arguments}", tokenizer)
            after = _literal(form.after_arguments, tokenizer)
            lines += [f"call_{number}: {before} arguments_{number} {after}"]
            lines += [f"arguments_{number}: %json {json.dumps({**parameters, **_COMPACT})}"]
        else:
            lines += _tagged(number, name, parameters, form, tokenizer)
    return Grammar(kind="lark", text="\n".join(lines), field="tools")


def _tagged(number: int, name: str, parameters: JsonObject, form: CallFormat, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the rules of a call whose arguments are between tags, in the order of its schema."""
    assert form.tags is not None, "call_grammar asks"
    properties, needed = parameters.get("properties") or {}, parameters.get("required") or []
    if not isinstance(properties, dict) or not isinstance(needed, list):
        raise bad_request([f"tools: the parameters of {name} are not a JSON schema of an object. Correct them"])
    rules = []
    for place, (key, schema) in enumerate(properties.items()):
        before = _literal(form.tags.before_key + key + form.tags.before_value, tokenizer)
        rule = f"{before} value_{number}_{place}"
        rules.append(rule if key in needed else f"({rule})?")
        yield f"value_{number}_{place}: {_value(key, schema, parameters, form.tags.after_value, tokenizer)}"
    yield f"call_{number}: {_literal(name + form.tags.after_name, tokenizer)} {' '.join(rules)}"


def _value(key: str, schema: JsonObject, parameters: JsonObject, end: str, tokenizer: Tokenizer) -> str:
    """Returns the rule of an argument and its end; text has no character with which the end's words begin.

    Raises:
      ApiError: the schema restricts text otherwise than by its values.
    """
    found = [*alternatives(schema, parameters)]
    texts = [one for one in found if allows_text(one)]
    if not texts:
        definitions = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        return f"%json {json.dumps({**schema, **definitions, **_COMPACT})} {_literal(end, tokenizer)}"
    if not any(one.keys() <= _PLAIN for one in texts):
        listed = [[None] if one.get("type") == "null" else values_of(one) for one in found]
        if None in listed:
            raise bad_request(
                [
                    f"tools: {key}: the model's chat template writes text without quotes, so that it can "
                    f"only be restricted by enum (found {sorted(texts[0])}). Remove the restriction"
                ]
            )
        written = [v if isinstance(v, str) else json.dumps(v) for values in listed for v in values or ()]
        choice = " | ".join(json.dumps(text, ensure_ascii=False) for text in written)
        return f"({choice}) {_literal(end, tokenizer)}"
    text = f"[^{re.escape(end.strip()[0])}]*"
    if tokenizer.special_text.search(end):
        return f"/{text}/ {_literal(end, tokenizer)}"
    # One pattern with the end, because a text by itself would take the end's line break, too.
    return f"/{text}{re.escape(end)}/".replace("\\\n", "\\n").replace("</", "<\\/")


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """Returns a text as Lark: special tokens by their ids, the id of a call as any id."""
    found, at = [], 0
    for match in [*tokenizer.special_text.finditer(text)]:
        found += [_quoted(text[at : match.start()]), f"<[{tokenizer.backend.token_to_id(match.group())}]>"]
        at = match.end()
    return " ".join(filter(None, [*found, _quoted(text[at:])]))


def _quoted(text: str) -> str:
    parts = [json.dumps(part, ensure_ascii=False) if part else "" for part in text.split(CALL_ID)]
    return " /[a-zA-Z0-9]{9}/ ".join(parts)
