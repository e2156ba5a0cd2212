"""lm-evaluation-harness on a server, by its `local-completions`: `url`, `model`, `folder` (tokenizer), `tasks`,
`task_folder`; results as JSON."""

import json

import lm_eval
import numpy as np
from bridge import inputs, save
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

given = inputs()
model = LocalCompletionsAPI(
    model=given["model"], base_url=given["url"], tokenizer=given["folder"], max_length=given["positions"], batch_size=3
)
manager = TaskManager(include_path=given["task_folder"])
results = lm_eval.simple_evaluate(model=model, tasks=given["tasks"], task_manager=manager, bootstrap_iters=0)
kept = {
    task: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    for task, metrics in results["results"].items()
}
save(results=np.array(json.dumps(kept)))
