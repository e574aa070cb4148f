"""The tasks by name."""

from lora_blip.tasks.base import Task
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.tasks.vqa import VqaTask

TASKS: dict[str, type[Task]] = {"caption": CaptionTask, "vqa": VqaTask, "retrieval": RetrievalTask}


def default_task(architecture: str) -> str:
    """Return the name of the task that checkpoints of this architecture were trained for."""
    return next(name for name, task in TASKS.items() if architecture in task.architectures)
