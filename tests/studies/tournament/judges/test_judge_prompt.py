"""The judge's prompt, and the reading of a verdict."""

import pytest

from qlora_jax.studies.tournament.judges.judge import (
    SYSTEM,
    TEMPLATE,
    JudgePrompt,
    parse_verdict,
    read_judge_prompts,
)
from tests.studies.tournament.tiny_tournament import write_lines

# Texts of artidoro/qlora at 7f4e95a, as JSON: eval/prompts/vicuna_prompt_threeclass.jsonl.
REFERENCE_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
REFERENCE_TEMPLATE = (
    r"[Question]\n{question}\n\n[The Start of Assistant 1's Answer]\n{answer_1}\n\n[The End of Assistant 1's Answer]"
    r"\n\n[The Start of Assistant 2's Answer]\n{answer_2}\n\n[The End of Assistant 2's Answer]"
    r"\n\n[System]\n{prompt}\n\n"
)


def test_the_prompt_is_the_reference_to_the_character():
    assert SYSTEM == REFERENCE_SYSTEM
    template = REFERENCE_TEMPLATE.replace(r"\n", "\n")
    assert template == TEMPLATE
    texts = dict(question="Q {prompt}", answer_1="{x} \\n %s", answer_2="}{", prompt="P")
    message = JudgePrompt(None, SYSTEM, TEMPLATE, "P").message("Q {prompt}", ("{x} \\n %s", "}{"))
    assert message == template.format(**texts)


def test_a_file_in_the_references_format_is_used_unchanged(tmp_path):
    rows = [
        {
            "prompt_id": number,
            "system_prompt": f"System {number}.",
            "prompt_template": REFERENCE_TEMPLATE.replace(r"\n", "\n") + f"{{{{{number}}}}}",
            "defaults": {"prompt": f"Instruction {number}."},
            "description": "unused",
            "category": category,
        }
        for number, category in enumerate(("general", "coding", "math"), 1)
    ]
    prompts = read_judge_prompts(write_lines(tmp_path / "prompts.jsonl", rows))
    assert [prompts.of(category).system for category in ("coding", "math", "writing", None)] == [
        *("System 2.", "System 3.", "System 1.", "System 1.")
    ]
    message = prompts.of("coding").message("Q", ("A", "B"))
    assert message.endswith("[System]\nInstruction 2.\n\n{2}")


def test_an_instruction_alone_gets_the_references_texts(tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", [{"defaults": {"prompt": "Decide."}}])
    (prompt,) = read_judge_prompts(path).prompts
    assert prompt == JudgePrompt(None, REFERENCE_SYSTEM, TEMPLATE, "Decide.")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"defaults": {}}, r"defaults: found no instruction"),
        ({"defaults": {"prompt": "x"}, "prompt_template": "{question}"}, r"missing fields \['answer_1', 'answer_2', "),
        ({"defaults": {"prompt": "x"}, "prompt_template": "{question.__class__}"}, r"unknown fields \['question.__cla"),
        ({"defaults": {"prompt": "x"}, "prompt_template": "{"}, r"prompt_template: .*Write a brace that is text twice"),
        ({"defaults": {"prompt": "x"}, "system_prompt": 3}, r"system_prompt: found 3, expected a text"),
    ],
)
def test_malformed_prompts_are_refused(tmp_path, row, problem):
    with pytest.raises(ValueError, match=problem):
        read_judge_prompts(write_lines(tmp_path / "prompts.jsonl", [row]))


@pytest.mark.parametrize(
    ("review", "verdict"),
    [
        ("Both are fine.\n1", 1),
        ("Long.\n\n  2  \n\n", 2),
        ("3", 3),
        ("1\nbecause it is longer", -1),
        ("The winner is 1", -1),
        ("x\n4", -1),
        ("x\n0", -1),
        ("x\n-1", -1),
        ("x\n1.0", -1),
        ("x\n" + "1" * 5000, -1),
        ("", -1),
    ],
)
def test_the_verdict_is_the_number_of_the_last_line(review, verdict):
    assert parse_verdict(review) == verdict
