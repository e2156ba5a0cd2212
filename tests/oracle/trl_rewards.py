"""Rewards that TRL's GRPOTrainer computes with functions of a file, and the values that these log."""

import asyncio
import importlib.util
import threading
import types
from collections import defaultdict

import torch
from accelerate import PartialState
from bridge import inputs, save
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name

request = inputs()
spec = importlib.util.spec_from_file_location("rewards", request["file"])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
functions = [getattr(module, name) for name in request["names"]]
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
trainer = types.SimpleNamespace(
    accelerator=types.SimpleNamespace(device=torch.device("cpu"), is_main_process=False),
    args=types.SimpleNamespace(report_to=[]),
    reward_funcs=functions,
    reward_processing_classes=[None] * len(functions),
    reward_func_names=[get_callable_name(function) for function in functions],
    state=types.SimpleNamespace(global_step=request["step"], max_steps=request["steps"]),
    environments=None,
    async_loop=loop,
    _pending_metrics=defaultdict(list),
    _pending_extra_logs=defaultdict(list),
)
trainer._log_metric = types.MethodType(GRPOTrainer._log_metric, trainer)
trainer._log_completion_extra = types.MethodType(GRPOTrainer._log_completion_extra, trainer)
count = len(request["prompts"])
rows = [
    {"prompt": request["prompts"][row], **{name: values[row] for name, values in request["columns"].items()}}
    for row in range(count)
]
PartialState(cpu=True)
rewards = GRPOTrainer._calculate_rewards(
    trainer, rows, request["prompts"], request["completions"], request["completion_ids"]
)
save(
    rewards=rewards.numpy(),
    metrics=[sum(values) / len(values) for values in trainer._pending_metrics.values()],
)
