"""Quantize with llm-compressor. Runs in an environment of its own; `python -m benchmarks.peers` starts it.

Groups of 64, because the usual 128 do not divide the model's hidden size of 576.
"""

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from measure import Job, Quantized, run_method
from transformers import AutoModelForCausalLM, AutoTokenizer

_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
_ACTIVATIONS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def quantize_weights(job: Job) -> Quantized:
    """GPTQ with the modifier's defaults (damping 0.01, static activation order)."""
    return _quantize(job, [_gptq({"weights": _WEIGHTS})])


def quantize_activations(job: Job) -> Quantized:
    """SpinQuant R1, R2 and R4 as Hadamard matrices in blocks of 64, then GPTQ; activations per token."""
    rotations = SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="hadamard", transform_block_size=64)
    return _quantize(job, [rotations, _gptq({"weights": _WEIGHTS, "input_activations": _ACTIVATIONS})])


def _gptq(scheme: dict[str, dict[str, object]]) -> GPTQModifier:
    return GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], **scheme}}, ignore=["lm_head"])


def _quantize(job: Job, recipe: list[object]) -> Quantized:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    windows = job.windows.tolist()
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]})
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        dataset=dataset,
        recipe=recipe,
        max_seq_length=job.windows.shape[1],
        num_calibration_samples=len(windows),
    )
    return Quantized(model, lambda: model.save_pretrained(job.out, save_compressed=True))


METHODS = {"w4a16": quantize_weights, "w4a4-dynamic": quantize_activations}

if __name__ == "__main__":
    run_method(METHODS, __doc__)
