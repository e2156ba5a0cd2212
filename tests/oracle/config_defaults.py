"""transformers' defaults of the attributes `names` in configs of `model_types`: {model_type: values}, as JSON."""

import json

from bridge import inputs, save
from transformers import AutoConfig

given = inputs()
configs = {kind: AutoConfig.for_model(kind) for kind in given["model_types"]}
found = {kind: [getattr(config, name) for name in given["names"]] for kind, config in configs.items()}
save(defaults=json.dumps(found))
