"""Replies with tools as TRL's GRPOTrainer makes them, where the model's turns are given."""

import asyncio
import importlib.util
import inspect
import json
import sys
import threading
import types

import numpy as np
import torch
from bridge import inputs, save
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema

request = inputs()
spec = importlib.util.spec_from_file_location("tools", request["file"])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
tools = [getattr(module, name) for name in request["names"]]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=request["tokenizer"], eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
)
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
count, longest = len(request["turns"]), request["max_completion_length"]


class Metrics(dict):
    """Lists of numbers by name."""

    def __missing__(self, name):
        return self.setdefault(name, [])


def replies(known: str, template: str, iterations: int | None) -> dict:
    """Returns the replies with a template, whose calls are written as in a template that TRL knows."""
    tokenizer.chat_template = known
    own, drawn = add_response_schema(tokenizer), [0] * count

    def generate(prompt_ids, images, fields, num_generations, has_tool_images=False):
        """Returns the next turn of the reply whose number its prompt has."""
        found = []
        for ids in prompt_ids:
            number = int(own.decode(ids).split("reply ")[1].split("<")[0])
            text = request["turns"][number][drawn[number]]
            drawn[number] += 1
            found.append(own(text, add_special_tokens=False)["input_ids"][:longest])
        return found, [[-1.0] * len(ids) for ids in found]

    trainer = types.SimpleNamespace(
        processing_class=own,
        _tokenizer=own,
        chat_template=template,
        chat_template_kwargs={},
        tools=tools,
        environment_factories=None,
        rollout_func=None,
        num_generations=1,
        max_completion_length=longest,
        max_tool_calling_iterations=iterations or sys.maxsize,
        use_vllm=False,
        _is_vlm=False,
        async_loop=loop,
        eos_token_ids=[own.eos_token_id],
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather=lambda tensor: tensor),
        model=types.SimpleNamespace(training=True, config=types.SimpleNamespace(max_position_embeddings=1 << 20)),
        state=types.SimpleNamespace(num_input_tokens_seen=0),
        _metrics={"train": Metrics()},
        _generate_single_turn=generate,
    )
    for name in ("_tokenize_prompts", "_get_tool_suffix_ids", "_tool_call_loop", "_generate"):
        setattr(trainer, name, types.MethodType(getattr(GRPOTrainer, name), trainer))
    sync = {tool.__name__: tool for tool in tools if not inspect.iscoroutinefunction(tool)}
    trainer._sync_tool_dicts = [sync] * count
    trainer._async_tool_dicts = [{tool.__name__: tool for tool in tools if tool.__name__ not in sync}] * count
    prompt_ids, ids, mask, messages, logps, *_ = trainer._generate(request["prompts"])
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    return {"prompts": prompt_ids, "ids": ids, "mask": mask, "messages": messages, "logps": logps, "metrics": metrics}


save(json=np.array(json.dumps([replies(*case) for case in request["cases"]])))
