"""Named mutants: faults that once passed the whole test suite.

Each is (name, part, [(old text, new text), …]). The first old text that is in a file of the part exactly once is replaced.
If the code changes, update its text here: `benchmarks.robustness.mutants` refuses to run with a text that it does not find.
"""

NAMED: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "ΔW summed in half precision", "lora",
        [("wide = torch.promote_types(start.dtype, torch.float32)", "wide = start.dtype")],
    ),
    (
        "ΔW multiplied in half precision", "lora",
        [("(B.to(dtype) @ self.A.to(dtype)).mul_", "(B.half() @ self.A.half()).to(dtype).mul_")],
    ),
    (
        "ΔW multiplied in the dtype of autocast", "lora",
        [("torch.autocast(self.A.device.type, enabled=False)", "torch.autocast(self.A.device.type, torch.bfloat16)")],
    ),
    (
        "a fresh adapter does not take the linear's mode", "lora",
        [("= lora.train(linear.training)", "= lora")],
    ),
    (
        "a second inject keeps the first dropout", "lora",
        [("        lora.dropout = dropout\n", "        pass\n")],
    ),
    (
        "the saved input may have another dtype", "fused",
        [(" or before.dtype != cast.dtype", "")],
    ),
    (
        "global forward pre-hooks are not counted", "fused",
        [("_global_forward_pre_hooks, _global_forward_hooks\n", "(), _global_forward_hooks\n")],
    ),
    (
        "global forward hooks are not counted", "fused",
        [("_global_forward_pre_hooks, _global_forward_hooks\n", "_global_forward_pre_hooks, ()\n")],
    ),
    (
        "the count of skipped steps is never reset", "learner",
        [("self.skipped + 1 if skipped else 0", "self.skipped + skipped")],
    ),
    (
        "a loss that is not finite counts as finite", "loop",
        [("is_finite = math.isfinite(norm) and math.isfinite(loss)", "is_finite = math.isfinite(norm)")],
    ),
    (
        "a checkpoint keeps gradients of a loss that is not finite", "learner",
        [("if all(math.isfinite(loss) for _, loss in of_ranks):", "if True:")],
    ),
    (
        "the oldest interrupted run comes first", "resume",
        [("key=lambda p: p.stat().st_mtime, reverse=True", "key=lambda p: p.stat().st_mtime")],
    ),
    (
        "a copy of a run's folder is resumed", "resume",
        [("if name != saved.run.name:", "if False:")],
    ),
    (
        "the middle of an image is not in its digest", "resume",
        [("for offset in (0, size // 2, max(0, size - SAMPLE))", "for offset in (0, max(0, size - SAMPLE))")],
    ),
    (
        "a changed run does not go back to the start of its step", "resume",
        [("        learner.rewind()\n", "")],
    ),
    (
        "a changed run counts steps, not images", "resume",
        [("progress.group * images[0] // images[1]", "progress.group")],
    ),
    (
        "the dropout is not written into the file", "adapter_file",
        [('"dropout": next(iter(loras.values())).dropout', '"dropout": 0.0')],
    ),
    (
        "the dropout of the file is ignored", "adapter_file",
        [('adapter.metadata["lora"].get("dropout", 0.0)', "0.0")],
    ),
    (
        "VQA: a mark with a space before it becomes a space", "metrics",
        [(' or f" {mark}" in flat', "")],
    ),
    (
        "VQA: a mark with a space after it becomes a space", "metrics",
        [('f"{mark} " in flat or ', "")],
    ),
    (
        "VQA: a comma in a number leaves other marks as spaces", "metrics",
        [(" or in_number", "")],
    ),
    (
        "VQA: the full stop of a decimal number is left out", "metrics",
        [(r'FULL_STOP = re.compile(r"\.(?!\d)")', r'FULL_STOP = re.compile(r"\.")')],
    ),
    (
        "VQA: more than 32 full stops are left out", "metrics",
        [('text, count=32)', "text)")],
    ),
]  # fmt: skip
