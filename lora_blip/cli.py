"""Command lines: what train.py and infer.py call, and `python -m lora_blip doctor`."""

import sys
from collections.abc import Callable
from typing import Any

from lora_blip.config import ConfigError, InferConfig, TrainConfig, parse


def run_train(script: dict[str, Any], doc: str | None) -> None:
    """Settings from train.py and its flags, then the loop; what a user did wrong is one message, not a traceback."""

    def go() -> None:
        config = parse(TrainConfig, script, doc=doc or "")
        from lora_blip.loop import train  # late, so that --help and a bad setting answer at once

        train(config)

    tell(go)


def run_infer(script: dict[str, Any], doc: str | None) -> None:
    def go() -> None:
        config = parse(InferConfig, script, doc=doc or "")
        from lora_blip.predict import infer

        infer(config)

    tell(go)


def tell(go: Callable[[], None]) -> None:
    """Run, and turn the errors that carry a remedy into one message and exit status 2."""
    try:
        go()
    except ConfigError as error:
        stop(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        from lora_blip.adapter import AdapterError
        from lora_blip.data.annotations import DataError
        from lora_blip.data.images import ImageError
        from lora_blip.loop import TrainingError
        from lora_blip.lora import LoRAError
        from lora_blip.models import ModelError
        from lora_blip.preflight import PreflightError
        from lora_blip.targets import TargetError

        known = (AdapterError, DataError, ImageError, LoRAError, TrainingError, ModelError, PreflightError, TargetError)
        if isinstance(error, known):
            stop(error)
        raise


def stop(error: Exception) -> None:
    message = str(error).strip()
    if "Original Traceback" in message:  # from a worker process: the last line is the message
        message = message.splitlines()[-1].partition(": ")[2]
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """`python -m lora_blip doctor`"""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lora_blip", description="LoRA for BLIP and BLIP-2")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="versions, devices, extras, and whether the embedded bases work: send it with a question"
    )
    parser.parse_args()
    from lora_blip.doctor import examine

    raise SystemExit(0 if examine() else 1)
