"""LoRA fine-tuning for BLIP and BLIP-2 by forward hooks. Start reading at `lora.py`."""

__version__ = "0.1.0"
