"""Check the paths of a training before torch is imported, which takes seconds."""

from pathlib import Path

from lora_blip.config import TrainConfig
from lora_blip.models.local_base import locate_base
from lora_blip.runtime.files import refuse_unwritable
from lora_blip.runtime.runs import locate_initial, run_to_resume
from lora_blip.runtime.user_paths import require_annotations, require_folder


def check_paths(config: TrainConfig) -> None:
    """Raise the error that the training would raise if a path of its settings does not exist or cannot be written."""
    refuse_unwritable(config.output_dir)
    for source in filter(None, (config.annotations, config.val_annotations)):
        require_annotations(source)
    require_folder("image_root", config.image_root)
    locate_base(config.model)
    if config.resume not in ("auto", "off"):
        run_to_resume(Path(config.resume))
    if config.init_adapter:
        locate_initial(config.init_adapter, config.output_dir)
