"""Names of the files that contain an adapter, and of repositories on the Hugging Face hub."""

import re

ADAPTER_NAME, BEST_NAME = "adapter.safetensors", "best.safetensors"  # the files of a run
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the files of an adapter of peft
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # user/name; a relative path of two parts looks the same
