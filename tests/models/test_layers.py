"""Modules that are not what their place asks for are refused by name."""

import pytest
from torch import nn

from pipeline.models.layers import (
    as_causal_model,
    as_decoder_layer,
    as_norm,
    find_linear,
    list_layers,
    read_input_width,
)
from tests.conftest import make_model


@pytest.mark.parametrize("read", [as_causal_model, as_decoder_layer, as_norm])
def test_a_module_of_another_kind_is_refused(read):
    with pytest.raises(TypeError, match=r"^Identity is not an? .+: it has no "):
        read(nn.Identity())


def test_a_linear_is_found_and_another_module_refused():
    holder = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    assert find_linear(holder, "linear") is holder["linear"]
    assert read_input_width(holder, "linear") == 3
    for read in (find_linear, read_input_width):
        with pytest.raises(TypeError, match=r"^norm is a LayerNorm, not a linear$"):
            read(holder, "norm")


def test_layers_of_a_model_are_listed_with_and_without_its_head():
    model = make_model("llama_tied")
    assert list_layers(model) == list_layers(model.model) == list(model.model.layers)
