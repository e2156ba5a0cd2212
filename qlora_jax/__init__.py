"""QLoRA finetuning in JAX."""
