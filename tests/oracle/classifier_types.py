"""The model types among `types` for which transformers has no class for sequence classification."""

from bridge import inputs, save
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

save(without=[kind for kind in inputs()["types"] if kind not in CLASSES])
