"""lm-evaluation-harness: `folder`, `tasks`, `task_folder`; results as JSON.

By its Hugging Face backend in f32, or with `url`, `model` and `positions` by its `local-completions` on a server.
"""

import json

import lm_eval
import numpy as np
from bridge import inputs, save
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

given = inputs()
if "url" in given:
    places = {"model": given["model"], "base_url": given["url"], "tokenizer": given["folder"]}
    model = LocalCompletionsAPI(**places, max_length=given["positions"], batch_size=3)
else:
    model = HFLM(pretrained=given["folder"], dtype="float32", batch_size=1, device="cpu")
manager = TaskManager(include_path=given["task_folder"])
results = lm_eval.simple_evaluate(model=model, tasks=given["tasks"], task_manager=manager, bootstrap_iters=0)
kept = {
    task: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    for task, metrics in results["results"].items()
}
save(results=np.array(json.dumps(kept)))
