"""Each supported family is served by vLLM's plugin and held by GGUF, or refused by its name."""

import pytest

from pipeline.interop.gguf_writer import _FAMILIES as GGUF_FAMILIES
from pipeline.interop.gguf_writer import find_gguf_obstacles
from pipeline.models.architectures import ARCHITECTURES, IMPORTED_AS, UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.serving.families import FAMILIES, SLIDES_BY_LAYER, served_class
from tests.conftest import NEAR_FAMILIES


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_has_a_class_of_vllm_or_is_refused_by_name(family):
    if family in FAMILIES:
        assert served_class(family) == f"PrefixQuant{FAMILIES[family]}"
        return
    with pytest.raises(
        UnsupportedModelError, match=f"model_type='{family}': vLLM serves only {', '.join(sorted(FAMILIES))} with a"
    ):
        served_class(family)


def test_families_of_engines_are_supported_ones():
    assert FAMILIES.keys() | GGUF_FAMILIES.keys() <= ARCHITECTURES.keys()
    assert set(SLIDES_BY_LAYER) <= FAMILIES.keys()
    assert set(IMPORTED_AS.values()) <= ARCHITECTURES.keys()


@pytest.mark.parametrize("family", [*NEAR_FAMILIES, "gemma2", "olmo2"])
def test_every_near_family_goes_into_gguf_or_is_refused_by_name(family, imported):
    checkpoint = Checkpoint(imported[family], "model")
    problems = "\n".join(find_gguf_obstacles(checkpoint, [], None))
    named = f"gguf cannot hold {checkpoint.config.model_type} models" in problems
    assert named == (checkpoint.config.model_type not in GGUF_FAMILIES)
    rope_type = checkpoint.config.rope_parameters.get("rope_type", "default")
    assert (f"gguf cannot hold rope_type={rope_type!r}" in problems) == (not named and rope_type != "default")


def test_gguf_refuses_another_activation_than_silu(imported):
    checkpoint = Checkpoint(imported["llama_tied"], "model")
    checkpoint.config.hidden_act = "gelu"
    assert "gguf takes hidden_act=silu for granted, not gelu" in find_gguf_obstacles(checkpoint, [], None)[0]
