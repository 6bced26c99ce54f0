"""`prefixquant onnx-generate` continues a text as the quantized model in transformers does."""

import logging

import pytest
import torch

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.other_formats import write_formats
from pipeline.runtime.arguments import ArgumentError
from pipeline.runtime.artifacts import make_header
from prefixquant.command import dispatch
from tests.inference.test_prefixed_model import make_quantized

EIGHT = {f"{group}.bits": 8 for group in ("weights", "activations", "keys", "values")}


@torch.no_grad()
def test_onnx_generate_continues_as_the_model_in_transformers(imported, tmp_path, monkeypatch, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    changes = EIGHT | {"activations.centered": False}
    rotation = {"r3": "identity", "r4": "identity", "r5": "identity"}
    checkpoint, _ = make_quantized(imported, tmp_path, "llama_tied", changes, (7, 9, 0), **rotation)
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    logging.disable(logging.DEBUG)  # pytest would format the exporter's traces
    write_formats(
        checkpoint, kv, tmp_path / "formats", formats=["onnx"], drop=[], max_shard_size="5GB",
        header=make_header("export", {}),
    )  # fmt: skip
    logging.disable(logging.NOTSET)
    folder = tmp_path / "formats" / "onnx"
    monkeypatch.setattr("sys.argv", ["prefixquant", "onnx-generate", str(folder), "The house", "--max-new-tokens", "5"])
    dispatch()
    token_ids = checkpoint.tokenizer("The house", return_tensors="pt")["input_ids"]
    whole = assemble_model(checkpoint, kv).generate(token_ids, max_new_tokens=5, do_sample=False)
    assert capsys.readouterr().out == checkpoint.tokenizer.decode(whole[0, token_ids.shape[1] :]) + "\n"


def test_without_the_extra_the_command_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["prefixquant", "onnx-generate", str(tmp_path), "The house"])
    with pytest.raises(ArgumentError, match=r"pip install 'prefixquant-pipeline\[onnx\]'"):
        dispatch()
