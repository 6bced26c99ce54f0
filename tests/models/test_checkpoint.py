"""A checkpoint is read as it was written, block by block, and stays an ordinary one for transformers."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models.architectures import find_architecture
from pipeline.models.checkpoint import (
    CONFIG,
    Checkpoint,
    CheckpointWriter,
    copy_companions,
    list_companions,
    load_block_file,
    save_block_file,
)
from pipeline.runtime.artifacts import ArtifactError, make_header, read_header
from tests.conftest import make_model

HEADER = make_header("rotation", {"seed": 0})


def write_checkpoint(model, folder, header=HEADER, settings=None):
    """Write a model with `CheckpointWriter`, its first block through `adopt_block`."""
    architecture, layers = find_architecture(model.config), model.model.layers
    folder.mkdir()
    writer = CheckpointWriter(folder, architecture, "rotation", header)
    first = layers[0].state_dict()
    save_block_file(folder.parent, architecture, 0, first, HEADER)
    writer.adopt_block(0, folder.parent / "block-00000.safetensors")
    for index in range(1, len(layers)):
        writer.write_block(index, layers[index].state_dict())
    outside = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    if model.config.tie_word_embeddings:
        del outside["lm_head.weight"]
    writer.write_embeddings(outside)
    writer.finish(model.config.to_dict() | {"dtype": "float32"}, settings or {})
    return folder


@pytest.fixture(params=["llama_tied", "llama_untied_biases", "gemma2"])
def model(request):
    return make_model(request.param)


@torch.no_grad()
def test_a_checkpoint_is_read_as_it_was_written(model, tmp_path):
    folder = write_checkpoint(model, tmp_path / "model", settings={"rotation": {"r4": True}})
    checkpoint = Checkpoint(folder, "rotation")
    assert checkpoint.header == HEADER
    assert checkpoint.settings == {"rotation": {"r4": True}}
    assert (checkpoint.block_count, checkpoint.dtype) == (3, torch.float32)
    for index, layer in enumerate(model.model.layers):
        tensors = checkpoint.load_block_tensors(index)
        assert tensors.keys() == layer.state_dict().keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in layer.state_dict().items())
        block = checkpoint.build_block(index)
        assert type(block) is type(layer)
        assert not block.training
        assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
    token_ids = torch.tensor([[5, 9, 40]])
    embedded = model.model.embed_tokens(token_ids)
    assert torch.equal(checkpoint.embed(token_ids), embedded)
    assert torch.equal(checkpoint.build_embedding(model.model.embed_tokens.weight)(token_ids), embedded)
    normed = embedded.clone()
    checkpoint.apply_final_norm_(normed)
    assert torch.equal(normed, model.model.norm(embedded))
    assert torch.equal(checkpoint.load_lm_head().weight, model.lm_head.weight)


@torch.no_grad()
def test_transformers_loads_the_folder(model, tmp_path):
    folder = write_checkpoint(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=model.config._attn_implementation)
    token_ids = torch.tensor([[5, 9, 40]])
    assert torch.equal(loaded.eval()(token_ids).logits, model(token_ids).logits)


def test_without_a_header_shards_are_identified_by_their_content(tmp_path):
    folders = [tmp_path / name / "model" for name in ("first", "same", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        folder.parent.mkdir()
        write_checkpoint(make_model("llama_tied", seed), folder, header=None)
    first, same, other = (read_header(folder, "rotation").fingerprint for folder in folders)
    assert first == same != other
    shards = [read_header(folder / "block-00001.safetensors", "rotation").fingerprint for folder in folders]
    assert shards[0] == shards[1] != shards[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"config\.json is not a JSON object\. Make the artifact again\.$"),
        ("{", r"config\.json is damaged \(.*dvc repro .* rotation"),
        (
            '{"model_type": "llama", "num_hidden_layers": "many"}',
            r"config\.json is damaged .*Make the artifact again\.$",
        ),
    ],
)
def test_a_damaged_config_is_one_message(text, message, tmp_path):
    folder = write_checkpoint(make_model("llama_tied"), tmp_path / "model")
    (folder / CONFIG).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Checkpoint(folder, "rotation")


def test_a_folder_of_another_stage_or_none_names_the_stage_to_rerun(tmp_path):
    with pytest.raises(ArtifactError, match=r"is missing.*dvc repro .* rotation"):
        Checkpoint(tmp_path / "none", "rotation")
    folder = write_checkpoint(make_model("llama_tied"), tmp_path / "model")
    with pytest.raises(ArtifactError, match="was written by the stage rotation, not finetuning"):
        Checkpoint(folder, "finetuning")
    with pytest.raises(ArtifactError, match=r"block-00007\.safetensors is missing"):
        load_block_file(folder, find_architecture(make_model("llama_tied").config), 7, "rotation")


def test_companions_are_tokenizer_and_template_files_and_no_files_of_a_stage(model_folders, tmp_path):
    source = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    for name in ("report.json", "artifact.json", "model.safetensors.index.json"):
        (source / name).write_text(json.dumps({}))
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "notes.md"):
        (source / name).write_text("x")
    (tmp_path / "target").mkdir()
    copy_companions(source, tmp_path / "target")
    copied = {path.relative_to(tmp_path / "target").as_posix() for path in list_companions(tmp_path / "target")}
    assert copied >= {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert copied == {path.relative_to(source).as_posix() for path in list_companions(source)}
    assert not copied & {"config.json", "report.json", "artifact.json", "model.safetensors.index.json", "notes.md"}
