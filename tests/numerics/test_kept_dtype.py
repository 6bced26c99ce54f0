"""Casts leave tensors that belong to quantizers in the dtype they were calibrated in."""

import pytest
import torch
from torch import nn

from pipeline.numerics.kept_dtype import KeepsDtype
from pipeline.numerics.quantizer import ActivationQuantizer, QuantizerSpec

VALUE = 0.1234567  # bfloat16 has no such number


class Some(KeepsDtype):
    kept_tensors = frozenset({"scale"})

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), VALUE))
        self.register_buffer("weight", torch.full((3,), VALUE))
        self.register_buffer("nothing", None)
        self.inner = nn.Linear(2, 2)


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "bfloat16": lambda module: module.bfloat16(),
    "there and back": lambda module: module.bfloat16().float(),
    "type": lambda module: module.type(torch.float16),
    "device and dtype": lambda module: module.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_kept_tensors_stay_and_all_others_are_cast(cast):
    module = nn.Sequential(Some())
    scale, parameter = module[0].scale.detach().clone(), module[0].scale
    CASTS[cast](module)
    assert module[0].scale is parameter
    assert torch.equal(module[0].scale, scale)
    expected = CASTS[cast](nn.Linear(2, 2)).weight.dtype
    assert module[0].inner.weight.dtype == module[0].weight.dtype == expected


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_quantizer_computes_the_same_after_a_cast(dynamic):
    quantizer = ActivationQuantizer(QuantizerSpec(4, False, 4, dynamic, centered=True), 8)
    values = {"clip_factor": torch.full((2, 2), VALUE)} if dynamic else {"scale": torch.full((2,), VALUE)}
    values |= {} if dynamic else {"zero_point": torch.tensor([6.0, 9.0])}
    quantizer.calibrate_(**values, shift=torch.full((8,), VALUE))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    expected = quantizer(x)
    assert torch.equal(quantizer.bfloat16()(x), expected)
    assert all(buffer.dtype == torch.float32 for buffer in quantizer.buffers())


def test_kept_tensors_move_to_other_devices():
    module = Some().to("meta")
    assert module.scale.device.type == module.weight.device.type == "meta"
    assert Some().to("meta", torch.bfloat16).scale.dtype == torch.float32
    assert module.to_empty(device="cpu").scale.device.type == "cpu"
