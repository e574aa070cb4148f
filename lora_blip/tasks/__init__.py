"""What differs by task. Each task owns its inputs, its labels, its loss, its prediction and its metric."""

from lora_blip.tasks.caption import CaptionTask

TASKS = {"caption": CaptionTask}
