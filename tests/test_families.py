"""The whole pipeline on a tiny model of every family: `pytest -m families -v` lists family by check.

All windows are longer than the sliding windows of the layers.
"""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from pipeline.inference.prefixed_model import assemble_model
from pipeline.models.architectures import find_architecture
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import Site
from pipeline.quantization import quantizer_init
from pipeline.quantization.block_init import choose_quantizers_
from pipeline.runtime.artifacts import load_tensors
from pipeline.text.params import SPLIT_GROUPS
from pipeline.text.windows import load_windows
from tests.conftest import (
    FAMILIES,
    NEAR_FAMILIES,
    PROSE_FILE,
    SIZES,
    WINDOW,
    read_json,
    tiny_params,
    write_params,
)
from tests.test_stages import ALL, contents, run

pytestmark = pytest.mark.families
# A block of Qwen2-0.5B's widths: 896 = 28 x 32 and 4864 = 76 x 64.
WIDE = {
    "num_hidden_layers": 1,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
STAGES = [stage for stage in ALL if not stage.startswith(("activation_plots", "report"))]


@pytest.fixture(scope="module", params=[*FAMILIES, *NEAR_FAMILIES, "qwen2_wide"])
def family(request, model_folders, tmp_path_factory):
    """Return the family's own model, and the folder of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    source = model_folders.get(request.param) or save_wide(folder / "source", model_folders["qwen2"])
    shutil.copyfile(PROSE_FILE, folder / "prose.txt")
    params = tiny_params(source, folder / "prose.txt")
    if request.param in ("mistral", "qwen2", "gemma", "vaultgemma", "smollm3", "granite", "glm", "phi3_partial"):
        params["rotation"]["r1"] = "hadamard"  # merged; the others: online
    params["calibration"]["start_token"] = "always" if request.param.startswith("gemma") else "never"
    # A clamped gate bounds what enters down_proj, so that no token stands out.
    params["prefix_search"]["outlier_threshold"] = 1.01 if request.param == "gpt_oss" else 1.2
    lengths = [params["calibration"][split]["length"] for split in SPLIT_GROUPS]
    assert min(lengths) > WINDOW
    write_params(folder, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(*STAGES, monkeypatch=patch)
    kernel = "eager" if request.param in ("gemma2", "vaultgemma") else None  # sdpa has no caps; older versions take it
    yield AutoModelForCausalLM.from_pretrained(source, attn_implementation=kernel).eval(), folder
    shutil.rmtree(folder)


def save_wide(folder, narrow):
    """Save a random Qwen2 of `WIDE`, with the tokenizer of `narrow`."""
    shutil.copytree(narrow, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES | WIDE))
    model.save_pretrained(folder)
    return folder


def evaluated(folder, variant):
    return load_tensors(folder / f"artifacts/evaluation/{variant}.safetensors", "evaluation")[0]


def compute_logits(folder, found):
    """Return logits of hidden states after the imported model's final norm, which may be scaled unlike the source's."""
    return Checkpoint(folder / "artifacts/model", "model").load_lm_head().logits(found)


def differ(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def test_rotated_is_the_original(family):
    original, folder = family
    ids = evaluated(folder, "original")["token_ids.prose"]
    rotated = assemble_model(Checkpoint(folder / "artifacts/rotation", "rotation"))
    assert differ(rotated(ids).logits, original(ids).logits) <= 1e-4  # measured: at most 3e-6


@torch.no_grad()
def test_walked_is_the_original(family):
    original, folder = family
    windows = load_windows(folder / "artifacts/calibration/evaluation/prose.safetensors")
    assert windows.text_start_token_id == (0 if original.config.model_type.startswith("gemma") else None)
    found = evaluated(folder, "original")["hidden.prose"]
    logits = original(windows.model_inputs()).logits[:, -windows.token_ids.shape[1] :]
    assert differ(compute_logits(folder, found), logits) <= 1e-5


@torch.no_grad()
def test_prefixed_is_the_original_reading_the_prefix(family):
    original, folder = family
    found = evaluated(folder, "original_prefix")
    prefix = torch.tensor(read_json(folder / "metrics/prefix_search.json")["prefix_token_ids"])
    assert len(prefix) > 1
    ids = found["token_ids.prose"]
    embedded = original.model.embed_tokens(torch.cat((prefix.expand(len(ids), -1), ids), dim=1))
    whole = original(inputs_embeds=embedded).logits
    assert differ(compute_logits(folder, found["hidden.prose"]), whole[:, len(prefix) :]) <= 1e-5


def test_the_loaded_model_equals_the_evaluated_one(family):
    original, folder = family
    assert torch.equal(evaluated(folder, "export")["hidden.prose"], evaluated(folder, "finetuning")["hidden.prose"])
    metrics = read_json(folder / "metrics/evaluation/export.json")
    architecture = find_architecture(original.config)
    quantizers = len(architecture.linears) + len(Site)
    assert metrics["quantizers_fired"] == quantizers * original.config.num_hidden_layers


def test_fine_tuning_brings_the_quantized_model_nearer_to_the_original(family):
    _, folder = family
    metrics = read_json(folder / "metrics/finetuning.json")
    assert metrics["validation_ratio"] <= 1
    assert metrics["end_to_end"]["kl_after"] <= metrics["end_to_end"]["kl_before"]


def test_an_interrupted_quantizer_init_ends_with_the_same_bytes(family, monkeypatch):
    original, folder = family
    undisturbed = contents(folder / "artifacts/quantizer_init")
    monkeypatch.chdir(folder)
    last = original.config.num_hidden_layers - 1
    finished = []

    def interrupt_last(*args, **options):
        if len(finished) == last:
            raise KeyboardInterrupt
        finished.append(args)
        return choose_quantizers_(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(quantizer_init, "choose_quantizers_", interrupt_last)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run("quantizer_init", monkeypatch=monkeypatch)
    assert len(list((folder / ".work/quantizer_init").glob("block-*.safetensors"))) == last
    run("quantizer_init", monkeypatch=monkeypatch)
    assert contents(folder / "artifacts/quantizer_init") == undisturbed
