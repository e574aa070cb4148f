"""Damaged adapters of peft, for `python -m benchmarks.robustness.fuzz peft`: settings, regexes, names and headers."""

import io
import json
import random
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz import changed, damaged, written
from lora_blip.errors import AdapterError, ConfigError, LoRAError

REGEXES = (
    "(a+)+b", "(.*)*x", "(.|.)*(.|.)*q", "(\\w+\\.)*(\\w+\\.)*z", "(?i).*QKV", "(", "[", "a{99999}", "(?:x{1000}){1000}",
    "(?P<a>q)(?P=a)", "\\1", "(?<=a+)b", "((((((((((", "|", "", ".", ".*", "^$", "qkv$", "\\Z\\A", "(?#",
    "\ud800", "[^\\W]*" * 9,
    "all-linear", "(?s:.)", "a" * 30_000, "|".join(f"m{n}" for n in range(5_000)), "(?:" * 90 + ")" * 90,
)  # fmt: skip
SETTINGS = {  # a valid value of each kind of setting, to add to a file
    "modules_to_save": ["cls"], "bias": "all", "lora_bias": True, "trainable_token_indices": [1], "target_parameters": ["a"],
    "use_dora": True, "use_rslora": True, "fan_in_fan_out": True, "init_lora_weights": "pissa", "peft_type": "IA3",
    "layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": "fc1", "rank_pattern": {"qkv": 2},
    "alpha_pattern": {".*": 0.5}, "revision": "main", "loftq_config": {"loftq_bits": 4}, "unknown": {"a": 1}, "r": 1,
    "base_model_name_or_path": None, "auto_mapping": {"base_model_class": "Blip2ForConditionalGeneration"},
}  # fmt: skip


class Peft:
    """Reads each pair of files, and writes it again for peft. Loads some of the adapters into a tiny model."""

    largest = 1 << 16

    def __init__(self, folder: Path) -> None:
        from lora_blip.inference import setup
        from lora_blip.lora import adapter_file, fit, header, injection, peft_names, peft_writer, targets
        from lora_blip.models import loading
        from lora_blip.runtime import runs
        from tests.support import tiny

        peft_names.Budget.__init__.__defaults__ = (0.05,)  # with the real limit, refusing a slow regex takes long
        with redirect_stdout(io.StringIO()):
            tiny.save_blip(folder / "blip")
            self.backbone = loading.load_backbone(str(folder / "blip"), "cpu")
        self.adapter_file, self.fit, self.injection, self.setup, self.writer = adapter_file, fit, injection, setup, peft_writer
        self.allowed = (AdapterError, ConfigError, LoRAError, header.HeaderError)
        self.weights, self.config = folder / runs.PEFT_WEIGHTS, folder / runs.PEFT_CONFIG
        self.loaded = 0
        self.seeds = []
        own = folder / "own.safetensors"
        for what, variant in (
            ("vit[0:1]:r=1", "lora"),
            ("vit.q,vit.v:r=2:alpha=3", "rslora"),
            ("text[1:]:r=1,vit.mlp", "dora"),
        ):
            loras = injection.inject(self.backbone.model, targets.find(self.backbone.model, what, 2, 4.0, variant))
            for lora in loras.values():
                lora.B.data.fill_(0.01)
            adapter_file.save(own, self.backbone, task={"name": "caption", "prompt": "a photo of"}, overwrite=True)
            injection.eject(self.backbone.model)
            for foreign in (False, True):
                self.seeds.append(self.pair(adapter_file.read(own), foreign))
        own.unlink()

    def pair(self, adapter: Any, foreign: bool) -> bytes:
        """Return both files of an adapter as one. `foreign`: without the header of lora_blip, and with a regex of targets."""
        from safetensors.torch import save

        updates = self.writer.updates_of(
            adapter.sites, adapter.tensors, lambda module: self.backbone.model.get_submodule(module).weight
        )
        tensors, metadata, text = self.writer.written(adapter.metadata, adapter.sites, updates)
        config = json.loads(text)
        if foreign:
            metadata = {"format": "pt"}
            config |= {"target_modules": r".*(qkv|fc1|fc2|projection|query|key|value|dense)", "layers_to_transform": None}
        return joined(json.dumps(config).encode(), save(tensors, metadata))

    def mutate(self, rng: random.Random, data: bytes) -> bytes:
        """Return a pair with a changed setting, a changed header, or damaged bytes."""
        config, weights = parted(data)
        chance = rng.random()
        try:
            if chance < 0.6:
                settings = json.loads(config)
                config = written(rng, self.with_change(rng, settings)).encode(errors="surrogatepass")
            elif chance < 0.9:
                length = int.from_bytes(weights[:8], "little")
                header = self.with_other_names(rng, json.loads(weights[8 : 8 + length]))
                text = written(rng, header).encode(errors="surrogatepass")
                claimed = len(text) if rng.random() < 0.97 else rng.choice((0, 1, 8 * 2**20, 10**11, 2**63, 2**64 - 1))
                weights = claimed.to_bytes(8, "little") + text + weights[8 + length :]
            elif rng.random() < 0.5:
                config = damaged(rng, config, [parted(seed)[0] for seed in self.seeds])
            else:
                weights = damaged(rng, weights, [parted(seed)[1] for seed in self.seeds])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            config = damaged(rng, config, [parted(seed)[0] for seed in self.seeds])
        return joined(config, weights)

    def with_change(self, rng: random.Random, settings: Any) -> Any:
        """Return settings with another value, a setting of SETTINGS, or a regex of REGEXES."""
        match rng.randrange(4):
            case 0:
                name = rng.choice([*SETTINGS])
                return settings | {name: SETTINGS[name]}
            case 1:
                name = rng.choice(("target_modules", "exclude_modules", "layers_pattern"))
                return settings | {name: rng.choice(REGEXES), "layers_to_transform": rng.choice((None, 0, [0, 1]))}
            case 2:
                name = rng.choice(("rank_pattern", "alpha_pattern"))
                return settings | {name: {rng.choice(REGEXES): rng.choice((1, 2, 4, 0.5, "a"))} | settings.get(name, {})}
        return changed(rng, settings)

    def with_other_names(self, rng: random.Random, header: Any) -> Any:
        """Return a header of a safetensors with a renamed tensor, or with another value."""
        names = [name for name in header if name != "__metadata__"]
        if not names or rng.random() < 0.4:
            return changed(rng, header)
        old = rng.choice(names)
        new = rng.choice((
            old.replace("base_model.model.", "module."), old.replace("lora_A", "lora_B"),
            old.replace(".weight", ".default.weight"),
            f"{old}.bias", old.replace("lora_A", "lora_embedding_A"), old.replace("vision_model.", "x" * 3000), "\x1b[2J" + old,
            old.replace(".weight", ""), "a." * 500 + "lora_A.weight", old.replace("lora_B.weight", "lora_magnitude_vector"),
        ))  # fmt: skip
        return {new if name == old else name: value for name, value in header.items()}

    def run(self, data: bytes) -> None:
        config, weights = parted(data)
        self.config.write_bytes(config)
        self.weights.write_bytes(weights)
        adapter = self.adapter_file.read(self.weights)
        updates = self.writer.updates_of(adapter.sites, adapter.tensors)
        self.writer.written(adapter.metadata, adapter.sites, updates)
        if zlib.crc32(data) % 8:  # loading takes ten times as long as reading
            self.fit.check_fit(self.backbone.model, adapter)
            return
        try:
            self.adapter_file.load(self.backbone, adapter)
            self.loaded += 1
            task = self.setup.task_of(self.backbone, adapter)
            self.setup.describe(task, adapter, 1, "fp32")
        finally:
            self.injection.eject(self.backbone.model)


def joined(config: bytes, weights: bytes) -> bytes:
    return len(config).to_bytes(4, "big") + config + weights


def parted(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:4], "big")
    return data[4 : 4 + size], data[4 + size :]
