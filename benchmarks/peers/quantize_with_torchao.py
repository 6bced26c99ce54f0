"""Quantize with torchao. Runs in an environment of its own; `python -m benchmarks.peers` starts it.

On a CPU torchao has no activations of 4 bits, so the nearest to W4A4 are W4A8 and W8A8. It reads no calibration text.
Groups of 64, because the usual 128 do not divide the model's hidden size of 576.
"""

import torch
from measure import Job, Quantized, run_method
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.quant_api import AOBaseConfig, IntxChooseQParamsAlgorithm
from transformers import AutoModelForCausalLM


def quantize_weights(job: Job) -> Quantized:
    """IntxWeightOnlyConfig of 4 bits, scales by HQQ."""
    algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(64), intx_choose_qparams_algorithm=algorithm)
    return _quantize(job, config, weight_bits=4)


def quantize_activations(job: Job) -> Quantized:
    """Int8DynamicActivationIntxWeightConfig: weights of 4 bits, scales by HQQ; activations of 8 bits per token."""
    algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    config = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(64), intx_choose_qparams_algorithm=algorithm)
    return _quantize(job, config, weight_bits=4)


def quantize_bytes(job: Job) -> Quantized:
    """Int8DynamicActivationInt8WeightConfig: weights per channel, activations per token."""
    return _quantize(job, Int8DynamicActivationInt8WeightConfig(), weight_bits=8)


def _quantize(job: Job, config: AOBaseConfig, weight_bits: int) -> Quantized:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"}
    codes = sum(linear.weight.numel() for linear in linears.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - codes  # tied weights are one parameter
    quantize_(model, config, filter_fn=lambda _, name: name in linears)
    scales = sum(linear.weight.scale.numel() for linear in linears.values())
    # Files would hold a byte for each code of 4 bits, so this is the size that packed codes have.
    mib = (codes * weight_bits / 8 + (others + scales) * 2) / 2**20
    return Quantized(model, mib=mib)


METHODS = {"w4a16": quantize_weights, "w4a8-dynamic": quantize_activations, "w8a8-dynamic": quantize_bytes}

if __name__ == "__main__":
    run_method(METHODS, __doc__)
