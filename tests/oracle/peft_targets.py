"""peft's choice of the modules that get an adapter: for each config, the names that it targets."""

import json

import numpy as np
from bridge import inputs, save
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

given = inputs()
found = [
    [name for name in given["names"] if check_target_module_exists(LoraConfig(**config), name)]
    for config in given["configs"]
]
save(found=np.array(json.dumps(found)))
