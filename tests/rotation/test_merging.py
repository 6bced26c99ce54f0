"""A rotated model computes the same function as the original, for every family, mode and size."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.blocks.quantized import BlockSettings, block_settings
from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.hadamard import hadamard_transform
from pipeline.rotation.matrices import load_rotation
from pipeline.rotation.merging import rotate_model
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import FAMILIES, POST_NORMS, make_model

CPU = torch.device("cpu")
NAMES = ("r1", "r2", "r3", "r4", "r5")


def rotate(
    source,
    folder,
    *,
    r1=None,
    r2="hadamard",
    r3="hadamard",
    r4="hadamard",
    r5=None,
    dtype=torch.float32,
    seed=0,
    block_size=-1,
    online_signs=False,
):
    """Rotate a model. `r1` None: hadamard where it can be merged. `r5` None: identity if r4 is, else hadamard."""
    checkpoint = Checkpoint(source, "model")
    metrics = rotate_model(
        checkpoint,
        folder,
        r1=r1 or ("hadamard" if checkpoint.architecture.rotates_residual else "identity"),
        r2=r2,
        r3=r3,
        r4=r4,
        r5=r5 or ("identity" if r4 == "identity" else "hadamard"),
        seed=seed,
        dtype=dtype,
        device=CPU,
        block_size=block_size,
        online_signs=online_signs,
    )
    rotated = Checkpoint(folder, "rotation")
    return rotated, BlockRunner(rotated, CPU, 2), metrics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "modes",
    [
        ("hadamard",) * 5,
        ("random", "random", "identity", "hadamard", "identity"),
        ("identity",) * 5,
        ("online", "hadamard", "hadamard", "hadamard", "hadamard"),
        ("identity", "identity", "identity", "identity", "hadamard"),
    ],
)
def test_rotation_preserves_logits(family, modes, imported, tmp_path, token_ids):
    settings = dict(zip(NAMES, modes, strict=True))
    if family in POST_NORMS and settings["r1"] != "online":
        settings["r1"] = "identity"
    rotated, runner, metrics = rotate(imported[family], tmp_path / "out", **settings)
    with torch.no_grad():
        expected = make_model(family)(token_ids).logits
    assert_close(walked_logits(rotated, runner, token_ids), expected)  # measured: at most 2e-6
    assert metrics["max_logit_deviation"] < 1e-12  # measured: at most 1e-14
    assert 1e-9 < metrics["float32_original_deviation"] < 1e-5
    assert 1e-9 < metrics["float32_logit_deviation"] < 1e-5
    assert rotated.config.tie_word_embeddings is False


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2"])
def test_block_rotations_preserve_logits_and_mix_only_within_blocks(family, imported, tmp_path, token_ids):
    r1 = "identity" if family in POST_NORMS else "block_hadamard"
    rotated, runner, metrics = rotate(
        imported[family],
        tmp_path / "out",
        r1=r1,
        r2="block_hadamard",
        r3="identity",
        r4="block_hadamard",
        r5="identity",
        block_size=4,
    )
    with torch.no_grad():
        expected = make_model(family)(token_ids).logits
    assert_close(walked_logits(rotated, runner, token_ids), expected)
    assert metrics["max_logit_deviation"] < 1e-12
    settings = block_settings(rotated, 0)
    assert (settings.online_r4, settings.r4_block_size) == (True, 4)
    assert BlockSettings.from_dict(settings.to_dict()) == settings
    if r1 == "block_hadamard":
        matrix = load_rotation(rotated.folder, "r1").apply(torch.eye(48, dtype=torch.float64))
        assert torch.equal(matrix != 0, torch.block_diag(*[torch.ones(4, 4)] * 12).bool())
        assert torch.allclose(matrix @ matrix.T, torch.eye(48, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_rotations_alone_load_in_transformers(family, imported, tmp_path, token_ids):
    folds = family not in POST_NORMS
    rotate(imported[family], tmp_path / "out", r3="identity", r4="identity")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(model(token_ids).logits, make_model(family)(token_ids).logits)
    assert torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight)) == folds


@pytest.mark.parametrize("family", ["gemma", "vaultgemma"])
def test_a_final_norm_that_adds_one_is_folded(family, imported, tmp_path, token_ids):
    rotate(imported[family], tmp_path / "out", r3="identity", r4="identity")
    kernel = "eager" if family == "vaultgemma" else None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=kernel).eval()
    with torch.no_grad():
        assert_close(model(token_ids).logits, make_model(family)(token_ids).logits)
    assert (model.model.norm.weight == 0).all()


@pytest.mark.parametrize("family", POST_NORMS)
@pytest.mark.parametrize("mode", ["hadamard", "random"])
def test_merging_r1_into_a_family_with_post_norms_is_refused(family, mode, imported, tmp_path):
    with pytest.raises(UnsupportedModelError, match=rf"{family}'.*post_attention_layernorm.*rotation\.r1: online"):
        rotate(imported[family], tmp_path / "out", r1=mode)
    assert not (tmp_path / "out").exists()


def test_r1_r2_r4_and_r5_reach_the_weights(imported, tmp_path):
    """Compare with a float64 product that is written out here."""
    rotated, _, _ = rotate(imported["llama_tied"], tmp_path / "out")
    original = Checkpoint(imported["llama_tied"], "model").load_block_tensors(1)
    tensors = rotated.load_block_tensors(1)
    eye = torch.eye(48, dtype=torch.float64)
    r1 = load_rotation(tmp_path / "out", "r1").apply(eye)
    r2 = load_rotation(tmp_path / "out", "r2").apply(torch.eye(12, dtype=torch.float64))
    r4, r5 = (hadamard_transform(torch.eye(width, dtype=torch.float64)) for width in (96, 48))
    for matrix in (r1, r2, r4, r5):
        assert (matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max() < 1e-12
        assert not torch.allclose(matrix, torch.eye(len(matrix), dtype=torch.float64))
    heads = lambda count: torch.block_diag(*[r2] * count)  # noqa: E731
    norm = original["input_layernorm.weight"].double()
    expected = {
        "self_attn.q_proj.weight": original["self_attn.q_proj.weight"].double() * norm @ r1,
        "self_attn.v_proj.weight": heads(2).T @ (original["self_attn.v_proj.weight"].double() * norm) @ r1,
        "self_attn.o_proj.weight": r1.T @ original["self_attn.o_proj.weight"].double() @ heads(4) @ r5,
        "mlp.down_proj.weight": r1.T @ original["mlp.down_proj.weight"].double() @ r4,
    }
    for name, tensor in expected.items():
        assert (tensors[name] - tensor).abs().max() < 1e-6, name


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text", "olmo2"])
def test_online_r1_changes_only_norms_and_their_readers(family, imported, tmp_path):
    """Readers undo it, norms multiply by one, and the residual stream is not rotated."""
    rotated, _, _ = rotate(imported[family], tmp_path / "out", r1="online", r4="identity")
    source = Checkpoint(imported[family], "model")
    original, tensors = source.load_block_tensors(1), rotated.load_block_tensors(1)
    architecture, width = source.architecture, source.config.hidden_size
    hadamard = hadamard_transform(torch.eye(width, dtype=torch.float64))
    for norm, reader in ((architecture.attention_norm, "self_attn.q_proj"), (architecture.mlp_norm, "mlp.up_proj")):
        gain = 1.0 if norm is None else original[f"{norm}.weight"].double() + architecture.norm_offset
        expected = (original[f"{reader}.weight"].double() * gain) @ hadamard
        assert (tensors[f"{reader}.weight"] - expected).abs().max() < 1e-6
        assert norm is None or (tensors[f"{norm}.weight"] + architecture.norm_offset == 1).all()
    for name in (architecture.embedding, architecture.final_norm, architecture.lm_head):
        assert torch.equal(rotated.load_tensor(name), source.load_tensor(name))
    assert torch.equal(tensors["mlp.down_proj.weight"], original["mlp.down_proj.weight"])
    assert block_settings(rotated, 1).online_r1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_signs_before_online_rotations_preserve_logits(family, imported, tmp_path, token_ids):
    rotated, runner, metrics = rotate(imported[family], tmp_path / "out", r1="online", online_signs=True)
    assert_close(walked_logits(rotated, runner, token_ids), make_model(family)(token_ids).logits)
    assert metrics["max_logit_deviation"] < 1e-12
    norm_signs = []
    for index in range(rotated.block_count):
        block = rotated.load_block_tensors(index)
        for norm in rotated.architecture.norms:
            norm_signs.append((block[f"{norm}.weight"].double() + rotated.architecture.norm_offset).round())
    for signs in norm_signs:  # each norm has other signs
        assert set(signs.tolist()) == {-1.0, 1.0}
        assert sum(torch.equal(signs, other) for other in norm_signs) == 1


def test_signs_that_nothing_can_carry_are_refused(imported, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"online_signs=true.*'olmo2'.*rotation\.r5 and r2: hadamard"):
        rotate(imported["olmo2"], tmp_path / "out", r1="online", r5="identity", online_signs=True)
    assert not (tmp_path / "out").exists()
    rotate(imported["olmo2"], tmp_path / "out", r1="online", online_signs=True)
    assert "r2.behind" in load_file(tmp_path / "out" / "rotations.safetensors")


@torch.no_grad()
def test_signs_after_r2_reach_the_weights(imported, tmp_path):
    rotated, _, _ = rotate(imported["llama_tied"], tmp_path / "out", r1="online", online_signs=True)
    original = Checkpoint(imported["llama_tied"], "model").load_block_tensors(1)
    stored = load_file(tmp_path / "out" / "rotations.safetensors")
    signs_after = stored["r2.behind"]
    assert set(signs_after.tolist()) == {-1.0, 1.0}
    inner = stored["r2.signs"].diag() @ hadamard_transform(torch.eye(12, dtype=torch.float64))
    r5 = hadamard_transform(torch.eye(48, dtype=torch.float64))
    heads = torch.block_diag(*[inner @ signs_after.diag()] * 4)
    weight = rotated.load_block_tensors(1)["self_attn.o_proj.weight"]
    assert (weight - original["self_attn.o_proj.weight"].double() @ heads @ r5).abs().max() < 1e-6


def test_settings_record_exactly_the_online_rotations(imported, tmp_path):
    for modes in ({"r3": "hadamard"}, {"r4": "hadamard"}, {"r5": "hadamard"}):
        asked = dict.fromkeys(("r3", "r4", "r5"), "identity") | modes
        rotated, _, _ = rotate(imported["qwen2"], tmp_path / "out", **asked)
        settings = block_settings(rotated, 0)
        assert {name for name in asked if getattr(settings, f"online_{name}")} == set(modes)
        assert BlockSettings.from_dict(settings.to_dict()) == settings
        assert ("online_r5" in settings.to_dict()) == settings.online_r5


def test_two_rotations_are_byte_identical_and_another_seed_differs(imported, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rotate(imported["llama_tied"], tmp_path / name, seed=seed)
    read = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert read["a"] == read["b"]
    assert read["a"]["block-00000.safetensors"] != read["c"]["block-00000.safetensors"]
