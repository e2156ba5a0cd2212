"""Settings of LoRA that peft takes for target_parameters: `settings` {name: options}, `targets`, a mixture's `config`.

For each target and setting, False if peft refuses or fails to build the adapter.
"""

import json

import transformers
from bridge import inputs, save
from peft import LoraConfig, get_peft_model

given = inputs()
config = transformers.AutoConfig.for_model(**given["config"])


def can_build(target, options):
    base = transformers.AutoModelForCausalLM.from_config(config)
    loftq = {"loftq_config": {"loftq_bits": 4}} if options.get("init_lora_weights") == "loftq" else {}
    try:
        get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=[target], **options, **loftq))
    except (AttributeError, ValueError):
        return False
    return True


found = {
    target: {name: can_build(target, options) for name, options in given["settings"].items()}
    for target in given["targets"]
}
save(found=json.dumps(found))
