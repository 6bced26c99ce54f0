"""Quantize with this project, through `prefixquant quantize`. `python -m benchmarks.peers` starts it.

All methods share one work folder next to --out, so that later ones reuse results of earlier ones. Time and memory are
those of the stages from `rotation` to `export`, of which each row counts all, also the reused ones. Stages measure the
time that passes, which on a busy machine is more than the CPU seconds of other tools.
"""

import json
from typing import Any

from measure import Job, Quantized, run_method
from transformers import AutoModelForCausalLM

import prefixquant

SOURCE = "packaged:smollm2-135m"
# Stages that measure, which the table does not show, do as little as possible.
_QUIET = {"evaluation.tasks": {}, "report.prompts": [], "activation_plots.windows": 1}
_STAGES = ("rotation", "prefix_search", "prefix_training", "quantizer_init", "finetuning", "export")
_NO_PREFIX = {"prefix.use": "none"}
_GROUPS = {"quantizer_init.weights.group_size": 64}


def measure_original(job: Job) -> Quantized:
    """The original model in float32. Its size is that of 16-bit weights."""
    model = AutoModelForCausalLM.from_pretrained(job.model)
    return Quantized(model, mib=sum(parameter.numel() for parameter in model.parameters()) * 2 / 2**20, seconds=0)


def quantize_weights(job: Job) -> Quantized:
    """Recipe w4a16kv16-compressed-tensors (GPTQ, R1 and R2 merged), not trained."""
    return _quantize(job, recipe="w4a16kv16-compressed-tensors", finetune="none", settings={"export.formats": []})


def quantize_activations(job: Job) -> Quantized:
    """Recipe w4a4kv4-dynamic with W4A4KV16 and weights in groups of 64, not trained."""
    return _quantize(job, recipe="w4a4kv4-dynamic", bits="W4A4KV16", finetune="none", settings=_GROUPS)


def quantize_static(job: Job) -> Quantized:
    """Recipe w4a4kv4, not trained."""
    return _quantize(job, finetune="none")


def train_static(job: Job) -> Quantized:
    """Recipe w4a4kv4: scales, norms and prefix trained on 49,152 tokens."""
    return _quantize(job)


def quantize_static_without_prefix(job: Job) -> Quantized:
    """Recipe w4a4kv4, no prefix, not trained."""
    return _quantize(job, finetune="none", settings=_NO_PREFIX)


def train_static_without_prefix(job: Job) -> Quantized:
    """Recipe w4a4kv4, no prefix, scales and norms trained on 49,152 tokens."""
    return _quantize(job, settings=_NO_PREFIX)


def _quantize(job: Job, *, settings: dict[str, Any] | None = None, **options: Any) -> Quantized:
    work = job.out.with_name("prefixquant.work")
    prefixquant.quantize(SOURCE, job.out, work=work, settings=_QUIET | (settings or {}), **options)
    costs = [json.loads((work / f"metrics/runtime/{stage}.json").read_text(encoding="utf-8")) for stage in _STAGES]
    model, _ = prefixquant.load(job.out)
    seconds, gib = (sum(cost["seconds"] for cost in costs), max(cost["peak_rss_gib"] for cost in costs))
    return Quantized(model, seconds=seconds, gib=gib)


METHODS = {
    "original": measure_original,
    "w4a16": quantize_weights,
    "w4a4-dynamic": quantize_activations,
    "w4a4kv4": quantize_static,
    "w4a4kv4-trained": train_static,
    "w4a4kv4-no-prefix": quantize_static_without_prefix,
    "w4a4kv4-no-prefix-trained": train_static_without_prefix,
}

if __name__ == "__main__":
    run_method(METHODS, __doc__)
