"""JSON schemas that transformers makes of the functions of a file; null where it refuses one."""

import importlib.util
import json

import numpy as np
from bridge import inputs, save
from transformers.utils import get_json_schema

request = inputs()
spec = importlib.util.spec_from_file_location("functions", request["file"])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def schema(name: str):
    try:
        return get_json_schema(getattr(module, name))
    except Exception:
        return None


save(json=np.array(json.dumps([schema(name) for name in request["names"]])))
