"""The errors that users see. Each message is complete: it names the file, line or module, and says what to do.

Catch `LoraBlipError` for all of them. The commands print the message and exit with status 2.
"""


class LoraBlipError(Exception):
    """The base class of the errors below. In peft: no equivalent; peft raises ValueError, which is also a base
    class of most errors below.

    >>> try: lora_blip.load_backbone("./no_such_folder")
    ... except lora_blip.LoraBlipError as error: print(error)
    model folder './no_such_folder' does not exist; give the folder of a checkpoint, or a hub name
    """


class ConfigError(LoraBlipError, ValueError):
    """A setting has an invalid value. The message names the setting."""


class LockedError(ConfigError):
    """Another process writes into the same folder."""


class OutputError(ConfigError):
    """An output folder cannot be written, or contains the output of another run."""


class FileError(LoraBlipError, OSError):
    """The system refused to read or write a file or folder. The message names its path, the reason, and a fix.

    `errno` and `strerror` are those of the system's error.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class PeerError(ConfigError):
    """Another process of this run failed. The main process prints the error; this process exits silently."""


class DataError(LoraBlipError, ValueError):
    """Data cannot be read or trained on. The message names the file and the line."""


class ImageError(LoraBlipError, ValueError):
    """An image cannot be read. The message is one line that is safe to print."""


class InputError(LoraBlipError, TypeError):
    """A function was called with an argument that it does not accept. The message names it, and gives the right call."""


class ModelError(LoraBlipError, ValueError):
    """A model cannot be loaded or used. The message says why."""


class MissingBaseError(ModelError):
    """There is no base model with this name or path, or it cannot be downloaded."""


class TargetError(LoraBlipError, ValueError):
    """A target matches no module, or a module that cannot get an adapter. The message lists the possible targets."""


class LoRAError(LoraBlipError, ValueError):
    """An operation would leave the model in an inconsistent state. The model was not changed."""


class AdapterError(LoraBlipError, ValueError):
    """An adapter file is missing or damaged, or does not fit its base. The message names the module."""


class CheckpointError(LoraBlipError, ValueError):
    """A checkpoint of a training run is missing or damaged, or belongs to another run."""


class PreflightError(LoraBlipError, ValueError):
    """A check before the first step failed: the run could not learn correctly. The message says why."""


class TrainingError(LoraBlipError, RuntimeError):
    """Training cannot continue. The adapter trained so far is saved."""


class JavaError(LoraBlipError, RuntimeError):
    """Java is missing, or one of its programs failed or took too long. The message is one line."""
