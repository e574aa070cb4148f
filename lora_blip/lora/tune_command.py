"""`lora-blip tune`: measure this machine, and store the limits of the fast paths in the user's cache folder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoSettings:
    """The settings of a command that has none."""


def tune(_: NoSettings) -> None:
    """Measure the limits, store them and print them."""
    from lora_blip.kernels import paths
    from lora_blip.lora import tuning
    from lora_blip.runtime.untrusted import printable

    row = tuning.tune()
    print(f"{printable(str(row))}\nstored in {printable(paths.tuned_file())}. New runs on this machine use it.")
