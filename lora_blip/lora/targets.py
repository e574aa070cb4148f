"""Select the linears that get an adapter: presets, exact names, regexes, layer ranges, and r or alpha for each target.

vit                     every linear of the ViT's blocks
vit.q, vit.v            only q, only v of the linear that computes q, k and v together (the fused qkv)
text.cross              the cross-attention of the text model; see PRESETS
vit[8:12]               blocks 8 to 11
qformer:r=4:alpha=8     with its own rank and alpha, instead of those of the settings
.*\\.mlp\\.fc1            a regex over the whole module path
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_blip.errors import TargetError
from lora_blip.lora.attached import Loaded, adapters, model_of
from lora_blip.lora.sites import (
    ALPHA,
    R,
    Site,
    base_size,
    check_update,
    is_linear,
    modules_of,
    refuse_compiled,
    refuse_peft,
    tied,
)
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted

VIT = r"vision_model\.encoder\.layers\.\d+\."
TEXT = r"text_(?:decoder\.bert|encoder)\.encoder\.layer\.\d+\."
QFORMER = r"qformer\.encoder\.layer\.\d+\."
LM = r"language_model\..*(?:layers|block)\.\d+\.(?:layer\.\d+\.)?"
OTHER_NAMES = {  # name in other libraries → preset
    "vision": "vit", "visual": "vit", "vision_model": "vit", "decoder": "text", "encoder": "text", "llm": "lm",
}  # fmt: skip
Q, K, V = ("q", 0), ("k", 1), ("v", 2)  # name and number of the thirds of W in a fused qkv

# preset → (regex over the module path, the block of a fused qkv (`Q`, `K`, `V`), or None)
PRESETS: dict[str, tuple[str, tuple[str, int] | None]] = {
    "vit": (VIT + r".*", None),
    "vit.q": (VIT + r"self_attn\.qkv", Q),
    "vit.k": (VIT + r"self_attn\.qkv", K),
    "vit.v": (VIT + r"self_attn\.qkv", V),
    "vit.qkv": (VIT + r"self_attn\.qkv", None),
    "vit.attn": (VIT + r"self_attn\..*", None),
    "vit.mlp": (VIT + r"mlp\..*", None),
    "text": (TEXT + r".*", None),
    "text.q": (TEXT + r"(?:cross)?attention\.self\.query", None),
    "text.k": (TEXT + r"(?:cross)?attention\.self\.key", None),
    "text.v": (TEXT + r"(?:cross)?attention\.self\.value", None),
    "text.attn": (TEXT + r"attention\..*", None),
    "text.cross": (TEXT + r"crossattention\..*", None),
    "text.mlp": (TEXT + r"(?:intermediate|output)\.dense", None),
    "qformer": (QFORMER + r".*", None),
    "qformer.q": (QFORMER + r"(?:cross)?attention\.attention\.query", None),
    "qformer.k": (QFORMER + r"(?:cross)?attention\.attention\.key", None),
    "qformer.v": (QFORMER + r"(?:cross)?attention\.attention\.value", None),
    "qformer.attn": (QFORMER + r"attention\..*", None),
    "qformer.cross": (QFORMER + r"crossattention\..*", None),
    "qformer.mlp": (QFORMER + r"(?:intermediate|output)(?:_query)?\.dense", None),
    "lm": (LM + r".*", None),
    "lm.q": (LM + r"(?:self_attn\.q_proj|(?:SelfAttention|EncDecAttention)\.q)", None),
    "lm.k": (LM + r"(?:self_attn\.k_proj|(?:SelfAttention|EncDecAttention)\.k)", None),
    "lm.v": (LM + r"(?:self_attn\.v_proj|(?:SelfAttention|EncDecAttention)\.v)", None),
    "lm.attn": (LM + r"(?:self_attn|SelfAttention|EncDecAttention)\..*", None),
    "lm.mlp": (LM + r"(?:fc1|fc2|DenseReluDense\..*)", None),
}
PARTS = {"ViT": r"vision_model\.", "Q-Former": r"qformer\.", "text": r"text_", "language model": r"language_model\."}
PREFIXES = {"vit": "vision_model", "text": "text_", "qformer": "qformer", "lm": "language_model"}  # of the paths of a part
LISTED = 24  # largest number of linears that an error lists
GRAMMAR = re.compile(r"(?P<body>.+?)(?:\[(?P<first>\d*):(?P<last>\d*)\])?(?P<own>(?::(?:r|alpha)=[\d.]+)*)")


@dataclass(frozen=True)
class Pattern:
    """A target in its parts. `text` is what the user wrote."""

    text: str
    body: str
    layers: range | None
    r: int
    alpha: float


def parse(target: str, r: int, alpha: float) -> Pattern:
    """Return the parts of a target such as `vit[8:12]:r=4`. If it has r and no alpha, alpha / r stays that of the settings."""
    match = GRAMMAR.fullmatch(target.strip())
    if match is None:
        raise TargetError(f"target {target!r} is empty; remove the extra comma, or give a preset, such as 'vit'")
    own = dict(piece.split("=") for piece in match["own"].split(":") if piece)
    if not own.get("r", "1").isdecimal() or int(own.get("r", 1)) < 1:
        raise TargetError(f"target {target.strip()!r}: r must be a whole number of at least 1, such as vit:r=8")
    if own.get("alpha", "1").count(".") > 1 or own.get("alpha", "1") == ".":
        raise TargetError(f"target {target.strip()!r}: alpha must be a number, such as vit:alpha=8")
    rank = int(own["r"]) if "r" in own else r
    layers = None
    if match["first"] is not None:
        layers = range(int(match["first"] or 0), int(match["last"] or 10_000))
    return Pattern(target.strip(), match["body"], layers, rank, float(own.get("alpha", alpha * rank / r)))


def find(
    model: nn.Module | Loaded, targets: str | Sequence[str], r: int = R, alpha: float = ALPHA, variant: str = "lora"
) -> list[Site]:
    """Return the sites of `targets` in the model's order: which linears get an adapter, with r and alpha of each.

    targets: presets, module names or regexes, as a list or separated by commas. A later target overrides r and alpha of an
    earlier one. variant: that of all sites. Raise TargetError if a target matches nothing (the message
    suggests others), or if one target is a fused linear and another one a block of it. Raise LoRAError for a wrong r, alpha or
    variant. In peft: `target_modules`, `rank_pattern` and `alpha_pattern`.

    >>> sites = lora_blip.find_targets(backbone, "vit,text:r=4")
    >>> sites[0].module, sites[0].r, sites[0].alpha
    ('vision_model.encoder.layers.0.self_attn.qkv', 8, 32.0)
    """
    model = model_of(model, targets, 'lora_blip.find_targets(backbone, "vit")')
    check_update(r, alpha, variant)
    refuse_peft(modules_of(model))
    chosen: dict[str, Site] = {}
    for target in _listed(targets):
        sites = _sites(model, parse(target, r, alpha))
        if not sites:
            raise TargetError(_nothing_matched(model, target))
        chosen.update({site.address: replace(site, variant=variant) for site in sites})
    doubled = {site.module for site in chosen.values() if site.block} & chosen.keys()
    if doubled:
        raise TargetError(f"{min(doubled)!r} is targeted as a whole and by a block of its rows; remove one of the two targets")
    order = {path: number for number, path in enumerate(modules_of(model))}
    return sorted(chosen.values(), key=lambda site: (order[site.module], site.rows or (0, 0)))


def _listed(targets: Any) -> list[str]:
    """Return the targets as a list. Raise TargetError if they are not texts."""
    listed = targets.split(",") if isinstance(targets, str) else list(targets) if isinstance(targets, Iterable) else [targets]
    for target in listed:
        if not isinstance(target, str):
            raise TargetError(f"the target {quoted(target)} is of type {type(target).__name__}; give a text, such as 'vit'")
    return listed


def _sites(model: nn.Module, pattern: Pattern) -> list[Site]:
    modules = modules_of(model)
    exact = re.escape(pattern.body) if pattern.body in modules else pattern.body
    regex, block = PRESETS.get(pattern.body, (exact, None))
    try:
        compiled = re.compile(regex)
    except re.error as error:
        raise TargetError(
            f"target {pattern.text!r} is not a preset, a module or a regex ({error}); give a preset, such as 'vit'"
        ) from None
    is_preset = pattern.body in PRESETS
    shared = tied(model) if is_preset else {}  # `inject` raises an error for a tied head that is named exactly
    found = []
    for path, module in modules.items():
        if not is_linear(module) or path in shared or not compiled.fullmatch(path) or ".lora" in path:
            continue
        if pattern.layers is None or layer_number(path) in pattern.layers:
            found.append(_site(path, module, block, pattern))
    return found


def _site(path: str, linear: Any, block: tuple[str, int] | None, pattern: Pattern) -> Site:
    if block is None:
        return Site(path, pattern.r, pattern.alpha)
    name, index = block
    third = linear.out_features // 3
    return Site(path, pattern.r, pattern.alpha, name, (index * third, (index + 1) * third))


def layer_number(path: str) -> int:
    """Return the number of the block of a module: 7 for `vision_model.encoder.layers.7.mlp.fc1`, -1 outside of all blocks."""
    match = re.search(r"(?:layers|layer|block)\.(\d+)\.", path)
    return int(match[1]) if match else -1


def _nothing_matched(model: nn.Module, target: str) -> str:
    """Return the error for a target that matches nothing. Its last line contains the targets to use instead.

    Raise LoRAError for a compiled model, whose modules have other paths.
    """
    refuse_compiled(modules_of(model))
    linears = [path for path, module in modules_of(model).items() if is_linear(module) and ".lora" not in path]
    counts = {name: sum(bool(re.fullmatch(regex, p)) for p in linears) for name, (regex, _) in PRESETS.items()}
    presets = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    error = f"target {target.strip()!r} matches no linear of {type(model).__name__}; "
    name, _, option = target.strip().partition(":")
    if counts.get(name) and option and not GRAMMAR.fullmatch(target.strip())["own"]:  # type: ignore[index]
        return (
            f"target {target.strip()!r}: after a preset, only r and alpha are possible, each with a number: {name}:r=8:alpha=32"
        )
    if near := _nearest(target, counts, linears):
        return f"{error}did you mean '{near}'? The presets that match: {presets or 'none'}"
    shapes = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", path) for path in linears)
    listed = "\n  ".join(list(shapes)[:LISTED])
    return f"{error}its linears are\n  {listed}\n" + (
        f"give a preset: {presets}" if presets else "give the name of a linear, or a regex such as '.*fc1'"
    )


def _nearest(target: str, counts: dict[str, int], linears: list[str]) -> str:
    """Return the nearest preset, or a regex for the linears whose path ends with that name. Return "" if none is similar."""
    parts = re.split(r"[\s;+|]+", target.strip())
    if len(parts) > 1 and all(map(counts.get, parts)):
        return ",".join(parts)
    one = re.fullmatch(r"([\w.]+)\[(\d+)(?:-(\d+))?\]", target.strip())  # vit[3] or vit[0-3]
    if one and counts.get(one[1]):
        last = _last_block(one[1], linears)
        first = min(int(one[2]), last)
        return f"{one[1]}[{first}:{min(max(int(one[3] or first), first), last) + 1}]"
    if (inside := re.fullmatch(r"(\w+)(\[\d*:\d*\])(\.\w+)", target.strip())) and counts.get(inside[1] + inside[3]):
        return inside[1] + inside[3] + inside[2]
    match = GRAMMAR.fullmatch(target.strip())
    name = match["body"] if match else target.strip()
    if counts.get(name):  # the preset matches linears, but none in these blocks
        return f"{name}[0:{_last_block(name, linears) + 1}]"
    if counts.get(preset := OTHER_NAMES.get(name.lower(), "")):
        return preset
    part, _, last_name = name.partition(".")
    if counts.get(part) and (prefix := PREFIXES.get(part)) and last_name:
        regex = rf"{prefix}.*\.{re.escape(last_name)}"
        if any(re.fullmatch(regex, path) for path in linears):
            return regex
    if any(path.endswith(f".{name}") for path in linears):
        return f".*{re.escape('.' + name)}"
    near = difflib.get_close_matches(name.lower(), [preset for preset, count in counts.items() if count], 1)
    return near[0] if near else ""


def _last_block(preset: str, linears: list[str]) -> int:
    """Return the number of the last block with a linear of a preset."""
    return max(layer_number(path) for path in linears if re.fullmatch(PRESETS[preset][0], path))


def table(model: nn.Module, name: str = "default") -> str:
    """Return a table with a line for each part of the model: its linears with an adapter, and their LoRA parameters."""
    loras = adapters(model, name)
    base = base_size(model)
    rows = []
    for part in [*dict.fromkeys(_part(address) for address in loras), "all"]:
        own = [lora for address, lora in loras.items() if part in ("all", _part(address))]
        size = sum(parameter.numel() for lora in own for parameter in lora.parameters())
        rows.append((part, len({lora.site.module for lora in own}), size))
    lines = [f"{'part':<15}{'linears':>8}{'LoRA parameters':>17}{'of the model':>14}"]
    return "\n".join(lines + [f"{p:<15}{n:>8}{size:>17,}{size / base:>14.2%}" for p, n, size in rows])


def too_large_ranks(model: nn.Module, name: str = "default") -> str:
    """Return a warning if r is larger than the shorter side of ΔW, which ΔW's rank cannot exceed. Otherwise return ""."""
    sides = {address: min(lora.A.shape[1], lora.B.shape[0]) for address, lora in adapters(model, name).items()}
    large = {address: lora for address, lora in adapters(model, name).items() if lora.site.r > sides[address]}
    if not large:
        return ""
    address = min(large, key=lambda each: sides[each])
    return (
        f"warning: r = {large[address].site.r} is larger than the smaller side of the update of "
        f"{counted(len(large), 'linear')}, such as {address} ({large[address].B.shape[0]} × {large[address].A.shape[1]}). "
        f"A rank above {sides[address]} costs time and "
        f"memory there and adds nothing; a usual value is R = {R} (--r {R})"
    )


def _part(address: str) -> str:
    return next((part for part, prefix in PARTS.items() if re.match(prefix, address)), "other")
