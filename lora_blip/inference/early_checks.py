"""Check the paths of an inference or an evaluation before torch is imported, which takes seconds."""

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.models.local_base import locate_base
from lora_blip.runtime import runs
from lora_blip.runtime.files import refuse_unwritable
from lora_blip.runtime.user_paths import is_file, require_annotations, require_folder


def check_inference(config: InferConfig) -> None:
    """Raise the error that `infer` would raise if a path of its settings does not exist or cannot be written."""
    from lora_blip.data.column_check import check_columns  # late: both import PIL, which --help does not need
    from lora_blip.data.image_sources import ImageSource

    require_folder("image_root", config.image_root)
    ImageSource(config.images, config.image_root)
    if config.references:
        require_annotations(config.references, "references")
        check_columns(config, "references")
    for setting in ("texts", "question"):
        is_file(getattr(config, setting), setting)
    check_model(config.model, config.adapter, config.runs)
    refuse_unwritable(config.output_dir or config.runs)


def check_evaluation(config: EvaluateConfig) -> None:
    """Raise the error that `evaluate` would raise if a path of its settings does not exist or cannot be written."""
    from lora_blip.data.column_check import check_columns  # late: it imports PIL, which --help does not need

    check_model(config.model, config.adapter)
    refuse_unwritable(config.output_dir or str(runs.RUNS))
    require_annotations(config.references, "references")
    require_folder("image_root", config.image_root)
    check_columns(config, "references")


def check_model(model: str, adapter: str, folder: str | runs.Path = runs.RUNS) -> None:
    """Raise AdapterError if there is no adapter at a path, and ModelError if there is no folder of a base."""
    if adapter not in ("", "none"):
        runs.locate(adapter, folder)
    if model:
        locate_base(model)
