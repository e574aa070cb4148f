"""Targets: presets, row blocks, layer ranges, regular expressions, rank per target, and the errors for wrong targets."""

import pytest
import torch
from transformers import AutoConfig, Blip2Config, Blip2ForConditionalGeneration, BlipConfig, BlipForConditionalGeneration

from lora_blip.errors import LoRAError, TargetError
from lora_blip.lora import injection, targets


def addresses(model, target, **options):
    return [site.address for site in targets.find(model, target, **options)]


def test_presets_match_every_linear_of_their_part(backbone):
    linears = {path for path, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear)}
    parts = "vit,text" if backbone.family == "blip" else "vit,qformer,lm"
    unmatched = linears - set(addresses(backbone.model, parts))
    expected = {
        "blip": {"text_decoder.cls.predictions.transform.dense", "text_decoder.cls.predictions.decoder"},
        "blip-2": {"language_projection", "language_model.lm_head"},
    }
    assert unmatched == expected[backbone.family]


def test_the_parts_of_a_preset_match_the_linears_of_the_preset(backbone):
    for whole, parts in (
        ("vit", "vit.attn,vit.mlp"), ("text", "text.attn,text.cross,text.mlp"),
        ("qformer", "qformer.attn,qformer.cross,qformer.mlp"), ("lm", "lm.attn,lm.mlp"),
    ):  # fmt: skip
        if whole in ("vit", "text") if backbone.family == "blip" else whole != "text":
            assert addresses(backbone.model, whole) == addresses(backbone.model, parts)


def test_q_and_v_are_row_blocks_of_the_fused_qkv(make):
    model = make("blip").model
    sites = targets.find(model, "vit.q,vit.v")
    width = model.config.vision_config.hidden_size
    assert [(s.block, s.rows) for s in sites[:2]] == [("q", (0, width)), ("v", (2 * width, 3 * width))]
    with pytest.raises(TargetError, match="whole and by a block"):
        targets.find(model, "vit,vit.q")


def test_ranges_names_regexes_and_ranks_per_target(make):
    """A range selects layers. A name or regex selects modules. The last target that matches a module sets its r and alpha."""
    model = make("blip").model
    assert addresses(model, "vit[1:]") == [a for a in addresses(model, "vit") if ".layers.1." in a]
    one = "vision_model.encoder.layers.0.mlp.fc1"
    assert addresses(model, one) == [one]
    assert addresses(model, r".*\.mlp\.fc[12]") == addresses(model, "vit.mlp")
    ranks = {s.address: (s.r, s.alpha) for s in targets.find(model, f"vit:r=2,{one}:r=6:alpha=5", r=4, alpha=8)}
    assert ranks.pop(one) == (6, 5.0) and set(ranks.values()) == {(2, 4.0)}


@pytest.mark.parametrize(("target", "reason"), [("vit:alpha=1..5", "alpha"), ("vit:alpha=.", "alpha"), ("vit:r=1.5", "r")])
def test_a_wrong_number_of_a_target_is_one_error(target, reason):
    with pytest.raises(TargetError, match=rf"target '{target}': {reason} must be a .*number.*, such as vit:{reason}=8"):
        targets.parse(target, 8, 32.0)


def test_the_error_for_an_unmatched_target_lists_presets_and_modules(make):
    with pytest.raises(TargetError, match=r"'qformer' matches no linear of BlipForConditionalGeneration") as raised:
        targets.find(make("blip").model, "qformer")
    assert "vit (8)" in str(raised.value) and "vision_model.encoder.layers.N.self_attn.qkv" in str(raised.value)
    with pytest.raises(TargetError, match="regex"):
        targets.find(make("blip").model, "vit(")


def test_the_table_counts_linears_and_parameters_by_part(make):
    model = make("opt").model
    sites = targets.find(model, "vit,qformer", r=4)
    injection.inject(model, sites)
    lines = [line.split() for line in targets.table(model).splitlines()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [(line[0], line[1]) for line in lines[1:]] == [("ViT", "8"), ("Q-Former", "16"), ("all", "24")]
    assert lines[-1][2] == f"{trained:,}"


def test_presets_match_the_expected_number_of_linears_in_real_sizes():
    """blip-image-captioning-large has 96 ViT linears, 3,145,728 parameters at r=8. blip2-opt-2.7b has 156 + 96 linears."""
    large = BlipConfig(
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    )
    opt = AutoConfig.for_model(
        "opt", hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        blip = BlipForConditionalGeneration(large)
        blip2 = Blip2ForConditionalGeneration(Blip2Config(text_config=opt, image_token_index=50265))
    linears = [(site.r, blip.get_submodule(site.module)) for site in targets.find(blip, "vit", r=8)]
    assert len(linears) == 96 and sum(r * (linear.in_features + linear.out_features) for r, linear in linears) == 3_145_728
    counts = {part: len(addresses(blip2, part)) for part in ("vit", "qformer", "lm")}
    assert counts == {"vit": 156, "qformer": 96, "lm": 192}
    assert len(addresses(blip2, "vit,qformer")) == 252


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("vitt", "'vit'"),
        ("Vit", "'vit'"),
        ("vit.qk[0:1]", "'vit.qkv'"),
        ("text.croos:r=4", "'text.cross'"),
        ("fc1", r"'.*\.fc1'"),
        ("vit[7:9]", "'vit[0:2]'"),
        ("vision", "'vit'"),
        ("decoder", "'text'"),
        ("vit.fc1", r"'vision_model.*\.fc1'"),
        ("text.dense", r"'text_.*\.dense'"),
        ("text[1]", "'text[1:2]'"),
        ("text[3]", "'text[1:2]'"),  # it has blocks 0 and 1
        ("vit[0-1]", "'vit[0:2]'"),
        ("vit[0-7]", "'vit[0:2]'"),
        ("text[0:1].q", "'text.q[0:1]'"),
        ("vit text", "'vit,text'"),
        ("vit+text", "'vit,text'"),
        ("vit; text.q", "'vit,text.q'"),
    ],
)
def test_a_wrong_target_suggests_the_nearest(make, wrong, near):
    """The error suggests a preset of the model, or a regex if the target is the last part of a module name, as in peft."""
    with pytest.raises(TargetError) as caught:
        targets.find(make("blip").model, wrong)
    assert f"; did you mean {near}? The presets that match: vit (" in str(caught.value)
    assert "\n" not in str(caught.value)  # the fix is not above a list of modules
    assert targets.find(make("blip").model, near.strip("'"))


@pytest.mark.parametrize("wrong", ["vit:r=x", "vit:rank=4", "vit:alpha=", "vit:r", "text.q:r=-1"])
def test_an_option_of_a_target_that_is_not_a_number_has_its_fix(make, wrong):
    """Before, the error suggested the preset without the option, or listed all linears."""
    with pytest.raises(
        TargetError, match=r"after a preset, only r and alpha are possible, each with a number: (.+:r=8:alpha=32)"
    ) as e:
        targets.find(make("blip").model, wrong)
    assert targets.find(make("blip").model, str(e.value).rpartition(": ")[2])


def test_a_compiled_model_is_named_as_the_reason(make):
    """Before, the error was that the target 'vit' matches no linear of OptimizedModule."""
    with pytest.raises(LoRAError, match=r"was compiled by torch\.compile"):
        targets.find(torch.compile(make("blip").model), "vit")


def test_the_error_for_an_unlike_target_has_no_suggestion(make):
    with pytest.raises(TargetError) as caught:
        targets.find(make("blip").model, "zzz")
    assert "did you mean" not in str(caught.value)
    first, *linears, last = str(caught.value).splitlines()
    assert first.startswith("target 'zzz' matches no linear") and last.startswith("give a preset: vit (")
    assert "  vision_model.encoder.layers.N.mlp.fc1" in linears


def test_a_rank_above_the_side_of_an_update_is_a_warning_with_a_usual_value(make):
    """The update of a block of rows has the number of these rows as its side."""
    model = make("blip").model
    width = model.config.vision_config.hidden_size
    injection.inject(model, "vit.q", r=width)
    assert targets.too_large_ranks(model) == ""
    injection.eject(model)
    injection.inject(model, "vit.q,vit.mlp:r=4", r=width + 1)
    warning = targets.too_large_ranks(model)
    assert f"r = {width + 1} is larger than the smaller side of the update of 2 linears, such as vision_model." in warning
    assert f"({width} × {width})" in warning and warning.endswith("(--r 8)")
