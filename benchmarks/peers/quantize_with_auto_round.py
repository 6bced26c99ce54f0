"""Quantize with auto-round. Runs in an environment of its own; `python -m benchmarks.peers` starts it.

The settings are those of its light recipe (50 steps of 8 windows for each block). Groups of 64, because the usual 128
do not divide the model's hidden size of 576.
"""

from auto_round import AutoRound
from measure import Job, Quantized, run_method
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

_STEPS, _BATCH = 50, 8


def quantize_weights(job: Job) -> Quantized:
    """Scheme W4A16 with groups of 64, light recipe (50 steps)."""
    return _quantize(job, "W4A16", group_size=64)


def quantize_activations(job: Job) -> Quantized:
    """Scheme INT4: weights per channel, activations per token, light recipe (50 steps)."""
    return _quantize(job, "INT4")


def quantize_blocks(job: Job) -> Quantized:
    """Scheme MXFP4: weights and activations as FP4 in blocks of 32, light recipe (50 steps)."""
    return _quantize(job, "MXFP4")


def _quantize(job: Job, scheme: str, **options: int) -> Quantized:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rounding = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=DataLoader(list(job.training_windows), batch_size=_BATCH),
        iters=_STEPS,
        seqlen=job.training_windows.shape[1],
        nsamples=len(job.training_windows),
        batch_size=_BATCH,
        device_map="cpu",
        **options,
    )
    quantized, _ = rounding.quantize()
    return Quantized(quantized, lambda: rounding.save_quantized(job.out, format="auto_round"))


METHODS = {"w4a16": quantize_weights, "w4a4-dynamic": quantize_activations, "mxfp4": quantize_blocks}

if __name__ == "__main__":
    run_method(METHODS, __doc__)
