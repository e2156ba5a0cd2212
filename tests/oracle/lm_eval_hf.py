"""lm-evaluation-harness with its Hugging Face backend, in f32: `folder`, `tasks`, `task_folder`; results as JSON."""

import json

import lm_eval
import numpy as np
from bridge import inputs, save
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

given = inputs()
model = HFLM(pretrained=given["folder"], dtype="float32", batch_size=1, device="cpu")
manager = TaskManager(include_path=given["task_folder"])
results = lm_eval.simple_evaluate(model=model, tasks=given["tasks"], task_manager=manager, bootstrap_iters=0)
kept = {
    task: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    for task, metrics in results["results"].items()
}
save(results=np.array(json.dumps(kept)))
