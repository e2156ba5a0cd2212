"""Modelfiles for Ollama: Go's template gives the text of the jinja template, for 20 conversations and more."""

import dataclasses
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_jax.data.tokenizer.chat_template import TOKENS
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_chat_template
from qlora_jax.export import main
from qlora_jax.io.export.modelfile import FILE, go_template, read_turns
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.parity.test_peft import LORAS, _write_run

ASSETS = Path(__file__).parent.parent.parent / "data/assets"
WORDS = [
    "sun",
    "{{ .Role }}",
    "2 + 2?",
    "\n\n",
    '"quoted"',
    "für",
    "\U0001f642",
    "<b>",
    "a  b",
    "\\n",
    "`x`",
    "{% if %}",
]
JOINED = (  # as in Llama 2: the system text is inside the first question
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
THINKS = (  # as in Qwen 3: the last message differs if it is a reply, which a prompt never ends with
    "{% for m in messages %}{{ '<' + m['role'] + '>' + ('<think></think>' if m['role'] == 'assistant' and loop.last "
    "else '') + m['content'] + '</s>' }}{% endfor %}{{ '<assistant>' if add_generation_prompt else '' }}"
)


def evaluate_go(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Evaluates the part of Go's text/template that is used here: range, if, else if, eq, not, variables, strings."""
    tokens = re.findall(r'\{\{ (?:"(?:[^"\\]|\\.)*"|[^"}])* \}\}', template)
    assert "".join(tokens) == template  # no text outside actions
    variables: dict[str, bool] = {}

    def truth(condition: str, message: dict[str, str]) -> bool:
        kind, *rest = condition.split()
        if kind == "eq":
            assert rest[0] == ".Role"
            return message["role"] == json.loads(rest[1])
        assert kind == "not"
        return not variables[rest[0]]

    def run(place: int, message: dict[str, str], active: bool) -> tuple[str, int]:
        """(text up to the end or else of this block, the place of that token)."""
        text = ""
        while place < len(tokens):
            action = tokens[place][3:-3]
            if action == "end" or action.startswith("else"):
                return text, place
            place += 1
            if action.startswith("range "):
                for each in messages:
                    part, end = run(place, each, active)
                    text += part
                place = end + 1
            elif action.startswith("if "):
                taken = False
                while True:
                    holds = active and not taken and truth(action.removeprefix("else ").removeprefix("if "), message)
                    part, place = run(place, message, holds)
                    text, taken, action, place = text + part, taken or holds, tokens[place][3:-3], place + 1
                    if action == "end":
                        break
            elif action == ".Content":
                text += message["content"] * active
            elif action.startswith("$"):
                name, _, value = action.split()
                if active:
                    variables[name] = value == "true"
            else:
                text += json.loads(action) * active
        return text, place

    return run(0, {}, True)[0]


def twenty_conversations(trimmed: bool, system: bool = True) -> list[list[dict[str, str]]]:
    rng, found = random.Random(0), []
    for number in range(20):
        roles = ["system"] * (system and number % 2) + ["user", "assistant"] * rng.randint(1, 4)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in roles[:-1]]
        texts = [text.strip() or "x" for text in texts] if trimmed else [f" {text}\n" for text in texts]
        found.append([{"role": role, "content": text} for role, text in zip(roles[:-1], texts, strict=True)])
    return found


def test_a_bos_that_begins_each_turn_is_part_of_the_turns() -> None:
    """SmolLM2's is <|im_start|>."""
    special = {"bos_token": "<|im_start|>"}
    turns, _ = read_turns(dataclasses.replace(_tokenizer(name="chatml", adds_bos=False), special_tokens=special))
    assert turns.start == "" and turns.begin["user"] == "<|im_start|>user\n"
    assert turns.begin["system"] == "<|im_start|>system\n"


def _tokenizer(template: str = "", name: str = "", *, adds_bos: bool) -> Tokenizer:
    loaded = load_tokenizer({"tokenizer_json": byte_level()})
    loaded.backend.add_special_tokens([*TOKENS.get(name, ()), "<|begin|>"])
    special = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    tokenizer = dataclasses.replace(loaded, special_tokens=special, add_bos_token=adds_bos)
    if name:
        return with_chat_template(tokenizer, name)
    return dataclasses.replace(tokenizer, chat_template=template)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", [*TOKENS, "joined", "smollm2", "no system", "thinks"])
def test_go_writes_what_jinja_writes(name: str, adds_bos: bool) -> None:
    smollm2 = (ASSETS / "smollm2_chat_template.jinja").read_text()
    texts = {"joined": JOINED, "smollm2": smollm2, "no system": NO_SYSTEM, "thinks": THINKS}
    writes_bos = name in ("llama3", "gemma")
    tokenizer = _tokenizer(texts.get(name, ""), "" if name in texts else name, adds_bos=adds_bos and writes_bos)
    turns, notes = read_turns(tokenizer)
    template = go_template(turns)
    assert bool(notes) == (name in ("llama3", "gemma", "no system"))
    for messages in twenty_conversations(trimmed=writes_bos, system=name != "no system"):
        expected = tokenizer.render(messages, add_generation_prompt=True)
        if adds_bos and writes_bos:
            expected = expected.removeprefix("<|begin|>")
        system = [{"role": "system", "content": turns.system}] * (turns.system != "" and messages[0]["role"] == "user")
        assert evaluate_go(template, system + messages) == expected
    assert ("SmolLM" in turns.system) == (name == "smollm2")


@pytest.mark.parametrize(
    ("template", "adds_bos", "problem"),
    [
        (NUMBERED, False, "begin with"),
        ("{{ strftime_now('%Y') }}" + NO_SYSTEM, False, "writes the date"),
        (NO_SYSTEM, True, r"does not begin with <\|begin\|>, which Ollama's tokenizer adds"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", False, "drops or rewrites messages"),
        (NO_SYSTEM.replace("m['content']", "m['content'].replace('a', 'b')"), False, "more than fixed texts"),
    ],
)
def test_other_templates_are_refused(template: str, adds_bos: bool, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_turns(_tokenizer(template, adds_bos=adds_bos))


@pytest.mark.slow
def test_exports_write_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(vocab_size=460, max_position_embeddings=512)
    smollm2 = (ASSETS / "smollm2_chat_template.jinja").read_text()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": smollm2}
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": json.dumps(special)}
    model, run = write_folder(tmp_path / "model", config, random_weights(config), **files), tmp_path / "run"
    _write_run(run, model, LORAS["rslora"])
    main(["--run", str(run), "--format", "gguf"])
    main(["--run", str(run), "--format", "gguf-lora", "--with_base"])
    main(["--run", str(run), "--format", "gguf-lora", "--output", str(run / "alone")])
    assert capsys.readouterr().out.count("for Ollama: ollama create NAME -f Modelfile") == 2
    merged, lora = ((run / form / FILE).read_text().splitlines() for form in ("gguf", "gguf-lora"))
    assert merged[0] == "FROM ./model-float16.gguf"
    assert lora[:2] == ["FROM ./base-float32.gguf", "ADAPTER ./adapter.gguf"] and lora[2:] == merged[1:]
    assert merged[1].startswith('TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}{{ "<|im_start|>user\\n" }}')
    assert merged[2] == 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""'
    assert merged[3:] == ['PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    assert not (run / "alone" / FILE).exists()  # its base is a folder
