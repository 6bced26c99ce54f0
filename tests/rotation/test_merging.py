"""A rotated model computes what the original does, whatever the family, the mode and the sizes."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.blocks.prefix_kv import compute_prefix_kv
from pipeline.blocks.quantized import BlockSettings, block_settings
from pipeline.blocks.walk import BlockRunner
from pipeline.importing.import_model import import_model
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.rotation import merging as rotation
from pipeline.rotation.gate import RotationError
from pipeline.rotation.matrices import load_rotation, make_rotation
from pipeline.rotation.merging import rotate_model
from tests.blocks.test_walk import assert_close, walked_logits
from tests.conftest import FAMILIES, POST_NORMS, make_model, open_model

CPU = torch.device("cpu")


def rotate(
    source,
    folder,
    r1=None,
    r2="hadamard",
    r3="hadamard",
    r4="hadamard",
    r5=None,
    dtype=torch.float32,
    seed=0,
    blocks=-1,
    online_signs=False,
):
    """`r1` None: hadamard where the family can have it; `r5` None: identity where r4 is."""
    r5 = r5 or ("identity" if r4 == "identity" else "hadamard")
    checkpoint = Checkpoint(source, "model")
    r1 = r1 or ("hadamard" if checkpoint.architecture.rotates_residual else "identity")
    metrics = rotate_model(checkpoint, folder, r1, r2, r3, r4, r5, seed, dtype, CPU, blocks, online_signs)
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
    modes = ("identity", *modes[1:]) if family in POST_NORMS and modes[0] != "online" else modes
    rotated, runner, metrics = rotate(imported[family], tmp_path / "out", *modes)
    with torch.no_grad():
        expected = make_model(family)(token_ids).logits
    assert_close(walked_logits(rotated, runner, token_ids), expected)  # measured: at most 2e-6
    assert metrics["max_logit_deviation"] < 1e-12  # measured: at most 1e-14
    assert 1e-9 < metrics["float32_original_deviation"] < 1e-5
    assert 1e-9 < metrics["float32_logit_deviation"] < 1e-5
    assert rotated.config.tie_word_embeddings is False


@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen3", "gemma2"])
def test_rotations_in_blocks_preserve_logits_and_mix_within_blocks_alone(family, imported, tmp_path, token_ids):
    r1 = "identity" if family in POST_NORMS else "block_hadamard"
    modes = (r1, "block_hadamard", "identity", "block_hadamard", "identity")
    rotated, runner, metrics = rotate(imported[family], tmp_path / "out", *modes, blocks=4)
    with torch.no_grad():
        expected = make_model(family)(token_ids).logits
    assert_close(walked_logits(rotated, runner, token_ids), expected)
    assert metrics["max_logit_deviation"] < 1e-12
    settings = block_settings(rotated, 0)
    assert (settings.online_r4, settings.r4_block_size) == (True, 4)
    assert BlockSettings.from_dict(settings.to_dict()) == settings
    if r1 == "block_hadamard":
        found = load_rotation(rotated.folder, "r1")
        matrix = found.apply(torch.eye(48, dtype=torch.float64))
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


@pytest.mark.parametrize("family", POST_NORMS)
@pytest.mark.parametrize("mode", ["hadamard", "random"])
def test_r1_is_refused_where_norms_stand_behind_the_blocks(family, mode, imported, tmp_path):
    with pytest.raises(UnsupportedModelError, match=rf"{family}'.*post_attention_layernorm.*rotation\.r1: online"):
        rotate(imported[family], tmp_path / "out", r1=mode)
    assert not (tmp_path / "out").exists()


def test_rotation_really_rotates(imported, tmp_path):
    """All of R1, R2, R4 and R5 reach the weights: against a float64 product written out here."""
    rotated, _, _ = rotate(imported["llama_tied"], tmp_path / "out")
    original = Checkpoint(imported["llama_tied"], "model").load_block_tensors(1)
    found = rotated.load_block_tensors(1)
    eye = torch.eye(48, dtype=torch.float64)
    r1 = load_rotation(tmp_path / "out", "r1").apply(eye)
    r2 = load_rotation(tmp_path / "out", "r2").apply(torch.eye(12, dtype=torch.float64))
    r4, r5 = (rotation.hadamard_transform(torch.eye(width, dtype=torch.float64)) for width in (96, 48))
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
        assert (found[name] - tensor).abs().max() < 1e-6, name


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text", "olmo2"])
def test_r1_online_stands_behind_the_norms_alone(family, imported, tmp_path):
    """Readers undo it, norms multiply by one, and the residual stream is what it was."""
    rotated, _, _ = rotate(imported[family], tmp_path / "out", r1="online", r4="identity")
    source = Checkpoint(imported[family], "model")
    original, found = source.load_block_tensors(1), rotated.load_block_tensors(1)
    architecture, width = source.architecture, source.config.hidden_size
    hadamard = rotation.hadamard_transform(torch.eye(width, dtype=torch.float64))
    for norm, readers in ((architecture.attention_norm, "self_attn.q_proj"), (architecture.mlp_norm, "mlp.up_proj")):
        gain = 1.0 if norm is None else original[f"{norm}.weight"].double() + architecture.norm_offset
        expected = (original[f"{readers}.weight"].double() * gain) @ hadamard
        assert (found[f"{readers}.weight"] - expected).abs().max() < 1e-6
        assert norm is None or (found[f"{norm}.weight"] + architecture.norm_offset == 1).all()
    for name in (architecture.embedding, architecture.final_norm, architecture.lm_head):
        assert torch.equal(rotated.load_tensor(name), source.load_tensor(name))
    assert torch.equal(found["mlp.down_proj.weight"], original["mlp.down_proj.weight"])
    assert block_settings(rotated, 1).online_r1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_signs_in_front_of_online_rotations_preserve_logits(family, imported, tmp_path, token_ids):
    rotated, runner, metrics = rotate(imported[family], tmp_path / "out", r1="online", online_signs=True)
    assert_close(walked_logits(rotated, runner, token_ids), make_model(family)(token_ids).logits)
    assert metrics["max_logit_deviation"] < 1e-12
    seen = []
    for index in range(rotated.block_count):
        block = rotated.load_block_tensors(index)
        for norm in rotated.architecture.norms:
            seen.append((block[f"{norm}.weight"].double() + rotated.architecture.norm_offset).round())
    for signs in seen:  # of each norm others
        assert set(signs.tolist()) == {-1.0, 1.0}
        assert sum(torch.equal(signs, other) for other in seen) == 1


def test_signs_that_nothing_would_carry_are_refused_by_name(imported, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"online_signs=true.*'olmo2'.*rotation\.r5 and r2: hadamard"):
        rotate(imported["olmo2"], tmp_path / "out", r1="online", r5="identity", online_signs=True)
    assert not (tmp_path / "out").exists()
    rotate(imported["olmo2"], tmp_path / "out", r1="online", online_signs=True)
    assert "r2.behind" in load_file(tmp_path / "out" / "rotations.safetensors")


@torch.no_grad()
def test_signs_behind_r2_reach_the_weights_and_keep_r5_from_undoing_it(imported, tmp_path):
    rotated, _, _ = rotate(imported["llama_tied"], tmp_path / "out", r1="online", online_signs=True)
    original = Checkpoint(imported["llama_tied"], "model").load_block_tensors(1)
    stored = load_file(tmp_path / "out" / "rotations.safetensors")
    behind = stored["r2.behind"]
    assert set(behind.tolist()) == {-1.0, 1.0}
    inner = stored["r2.signs"].diag() @ rotation.hadamard_transform(torch.eye(12, dtype=torch.float64))
    r5 = rotation.hadamard_transform(torch.eye(48, dtype=torch.float64))
    heads = torch.block_diag(*[inner @ behind.diag()] * 4)
    found = rotated.load_block_tensors(1)["self_attn.o_proj.weight"]
    assert (found - original["self_attn.o_proj.weight"].double() @ heads @ r5).abs().max() < 1e-6
    # Of powers of two R5 is made of R2: without signs behind it, a channel of R2 ends up in one place of each head.
    eye, generator = torch.eye(8, dtype=torch.float64), torch.Generator().manual_seed(1)
    whole = rotation.hadamard_transform(torch.eye(32, dtype=torch.float64))
    reached = {}
    for behind in (False, True):
        r2 = make_rotation("hadamard", 8, generator, behind=behind)
        assert torch.allclose(r2.undo(r2.apply(eye)), eye)
        spread = torch.block_diag(*[r2.apply(eye)] * 4) @ whole
        reached[behind] = (spread.abs() > 1e-9).sum(1)
    assert (reached[False] == 4).all()
    assert (reached[True] > 4).all()


def test_settings_record_exactly_the_online_rotations(imported, tmp_path):
    for modes in ({"r3": "hadamard"}, {"r4": "hadamard"}, {"r5": "hadamard"}):
        asked = dict.fromkeys(("r3", "r4", "r5"), "identity") | modes
        rotated, _, _ = rotate(imported["qwen2"], tmp_path / "out", **asked)
        settings = block_settings(rotated, 0)
        assert {name for name in asked if getattr(settings, f"online_{name}")} == set(modes)
        assert BlockSettings.from_dict(settings.to_dict()) == settings
        assert ("online_r5" in settings.to_dict()) == settings.online_r5


def test_continuous_prefix_goes_through_r1(imported, tmp_path, token_ids):
    """Embeddings that are no token's: the same logits in the rotated model through e @ R1."""
    embeddings = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    checkpoint, runner = open_model(imported["qwen3"])
    expected = walked_logits(checkpoint, runner, token_ids, compute_prefix_kv(checkpoint, embeddings, runner))
    rotated, runner, _ = rotate(imported["qwen3"], tmp_path / "out")
    moved = load_rotation(tmp_path / "out", "r1").apply(embeddings.double())
    prefix_kv = compute_prefix_kv(rotated, moved, runner)
    assert_close(walked_logits(rotated, runner, token_ids, prefix_kv), expected)


def test_two_rotations_are_byte_identical_and_another_seed_differs(imported, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rotate(imported["llama_tied"], tmp_path / name, seed=seed)
    read = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert read["a"] == read["b"]
    assert read["a"]["block-00000.safetensors"] != read["c"]["block-00000.safetensors"]


def test_a_narrower_dtype_is_reported_not_judged(imported, tmp_path):
    rotated, _, metrics = rotate(imported["llama_tied"], tmp_path / "out", dtype=torch.bfloat16)
    assert rotated.dtype == torch.bfloat16
    assert metrics["max_logit_deviation"] < 1e-12
    assert metrics["float32_logit_deviation"] < 1e-5 < metrics["dtype_logit_deviation"] < 0.1


@pytest.mark.parametrize(
    ("description", "damage"),
    [
        ("a reader off by one percent", lambda t: t["self_attn.q_proj.weight"].mul_(1.01)),
        ("a bias of v_proj in another basis", lambda t: t["self_attn.v_proj.bias"].add_(0.1)),
        (
            "another R4 merged than applied",
            lambda t: t.update({"mlp.down_proj.weight": t["mlp.down_proj.weight"].flip(1)}),
        ),
    ],
)
def test_the_gate_stops_a_wrong_rotation_and_writes_nothing(description, damage, imported, tmp_path, monkeypatch):
    right = rotation.rotate_block

    def wrong(*args):
        tensors = dict(right(*args))
        damage(tensors)
        yield from tensors.items()

    monkeypatch.setattr(rotation, "rotate_block", wrong)
    with pytest.raises(RotationError, match="is not the original: logits differ by"):
        rotate(imported["llama_untied_biases"], tmp_path / "out")
    assert not list(tmp_path.iterdir()), description


def test_rounding_of_massive_activations_is_no_error(model_folders, tmp_path):
    """Hidden states in the tens of thousands: float32 differs by more than 1e-4, and nothing is wrong."""
    folder = shutil.copytree(model_folders["llama_untied_biases"], tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][5] *= 1e4
    tensors["model.norm.weight"][5] = 1e-6  # the massive channel is not what is said
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_model(str(folder), None, torch.float32, tmp_path / "model")
    _, _, metrics = rotate(tmp_path / "model", tmp_path / "out", r5="identity")
    assert metrics["float32_logit_deviation"] > 1e-4  # measured: 1.7e-4
    # It does as much to the original: measured 1.15 times.
    assert 0.5 < metrics["float32_original_deviation"] / metrics["float32_logit_deviation"] < 2
    assert metrics["max_logit_deviation"] < 1e-9


def test_modes():
    x = torch.randn(5, 20, dtype=torch.float64)
    assert torch.equal(make_rotation("identity", 20, torch.Generator()).apply(x), x)
    for mode in ("hadamard", "random"):
        y = make_rotation(mode, 20, torch.Generator().manual_seed(0)).apply(x)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))
        assert not torch.allclose(y, x)
