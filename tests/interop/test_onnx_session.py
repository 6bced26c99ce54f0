"""The ONNX folder in ONNX Runtime computes the logits of the quantized model: all at once, by token, padded, static.

Values differ by the order of float sums, about 1e-6. Where a value lies that close to the middle between two integers,
it gets the next integer, and logits of later positions move by the effect of one step.
"""

import logging
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.export.params import OnnxParams
from pipeline.importing.import_model import import_model
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.other_formats import write_formats
from pipeline.runtime.artifacts import make_header
from prefixquant.command import dispatch
from tests.conftest import ROOT, SIZES, make_tokenizer, randomize_, read_json
from tests.inference.test_prefixed_model import make_quantized

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

from benchmarks.quality.onnx import measure_losses  # noqa: E402  (needs onnx)
from benchmarks.quality.onnx_parity import compare_perplexity, record_integers, run_integers  # noqa: E402
from pipeline.interop.onnx_folder import write_onnx  # noqa: E402  (needs onnx)
from pipeline.interop.onnx_graph import GraphMismatchError, build_graph, fill_graph_  # noqa: E402
from pipeline.interop.onnx_session import OnnxFolderError, OnnxModel  # noqa: E402  (needs onnxruntime)

# An export takes 2 seconds and 2 more for each block. Two blocks are enough: they show that blocks are kept apart.
ONE, TWO = SIZES | {"num_hidden_layers": 1}, SIZES | {"num_hidden_layers": 2}
CONFIGS = {
    "llama": LlamaConfig(**TWO, tie_word_embeddings=True),
    "llama_small": LlamaConfig(**ONE),
    "mistral": MistralConfig(**ONE, head_dim=20, sliding_window=8),
    "qwen2": Qwen2Config(**TWO, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": Qwen3Config(**ONE, head_dim=16, tie_word_embeddings=True),
}
EIGHT = {f"{group}.bits": 8 for group in ("weights", "activations", "keys", "values")} | {
    "activations.symmetric": False
}
MERGED = {"r3": "identity", "r4": "identity", "r5": "identity"}
STATIC = OnnxParams(sequence_length=4, cache_length=24)
# Kind -> family, changes to quantizer_init, rotation, export.onnx.
KINDS = {
    "W8A8": ("llama", EIGHT, MERGED, OnnxParams()),
    "W8A8 static sizes": ("llama_small", EIGHT | {"keys.bits": 16, "values.bits": 16}, MERGED, STATIC),
    "W4A8 rotated": (
        "mistral",
        EIGHT | {"weights.bits": 4, "weights.group_size": 16},
        {"r1": "online"},
        OnnxParams(widest_rotation=96),
    ),
    "W8A16": (
        "qwen2",
        EIGHT | {"activations.format": "int16", "activations.bits": 16, "weights.symmetric": False},
        MERGED,
        OnnxParams(),
    ),
    "W8A8 integers in the past": (
        "qwen3",
        EIGHT | {"activations.symmetric": True, "activations.centered": False, "keys.centered": False},
        MERGED,
        OnnxParams(cache="integer"),
    ),
}
TEXTS = torch.randint(2, 320, (8, 14), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        randomize_(AutoModelForCausalLM.from_config(config)).save_pretrained(root / "source" / family)
        make_tokenizer().save_pretrained(root / "source" / family)
        import_model(str(root / "source" / family), None, torch.float32, root / family)
    return {family: root / family for family in CONFIGS}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, sources, tmp_path_factory):
    """Return the quantized model in memory, the same model in ONNX Runtime, and its folder."""
    family, changes, rotation, params = KINDS[request.param]
    folder = tmp_path_factory.mktemp("exported")
    checkpoint, _ = make_quantized(sources, folder, family, changes, (7, 9, 0), **rotation)
    kv = load_prefix_kv(checkpoint.folder, checkpoint.stage)
    logging.disable(logging.DEBUG)  # pytest would format the exporter's traces, which takes a minute
    write_formats(
        checkpoint,
        kv,
        folder / "formats",
        formats=["onnx"],
        drop=[],
        max_shard_size="5GB",
        header=make_header("export", {}),
        prefix_token_ids=[7, 9, 0],
        onnx=params,
    )
    logging.disable(logging.NOTSET)
    return (
        assemble_model(checkpoint, kv),
        OnnxModel(folder / "formats" / "onnx", threads=1),
        folder / "formats" / "onnx",
    )


SAME = 0.75
STEP = 0.1


def assert_same(logits, expected):
    """Most positions are equal but for the order of sums; the others differ by the effect of one integer step."""
    largest = np.abs(expected).max()
    differences = np.abs(logits - expected).max(-1) / largest
    assert (differences < 1e-3).mean() >= SAME
    assert differences.max() < STEP


@torch.no_grad()
def test_a_whole_text_has_the_logits_of_the_quantized_model(exported):
    model, session, _ = exported
    if session.step is None:
        assert_same(session.read(TEXTS.numpy())[0], model(TEXTS).logits.numpy())
        return
    for text in TEXTS:
        assert_same(session.read(text[None].numpy())[0], model(text[None]).logits.numpy())


@torch.no_grad()
def test_reading_by_token_gives_the_same_logits(exported):
    model, session, _ = exported
    expected = model(TEXTS[:1]).logits.numpy()
    logits, state = session.read(TEXTS[:1, :5].numpy())
    parts = [logits]
    for token in TEXTS[0, 5:].tolist():
        logits, state = session.read([[token]], state)
        parts.append(logits)
    assert_same(np.concatenate(parts, 1), expected)
    assert state.lengths.tolist() == [14]


@torch.no_grad()
def test_padding_on_the_left_changes_no_text(exported):
    model, session, _ = exported
    mask = np.ones((3, 14), np.int64)
    mask[1, :6] = mask[2, :11] = 0
    if session.step is not None:
        with pytest.raises(OnnxFolderError, match="3 texts with padding=True: a graph with static sizes reads one"):
            session.read(TEXTS[:3].numpy(), mask=mask)
        return
    logits, state = session.read(TEXTS[:3].numpy(), mask=mask)
    for row, start in enumerate((0, 6, 11)):
        assert_same(logits[row, start:], model(TEXTS[row : row + 1, start:]).logits[0].numpy())
    after, _ = session.read(TEXTS[3:6, :1].numpy(), state)
    for row, start in enumerate((0, 6, 11)):
        whole = torch.cat((TEXTS[row, start:], TEXTS[3 + row, :1]))
        assert_same(after[row], model(whole[None]).logits[0, -1:].numpy())


@torch.no_grad()
def test_the_same_integers_at_every_site_give_the_same_logits(exported):
    model, session, folder = exported
    if session.step is not None:
        pytest.skip("a graph with static sizes reads its text in pieces")
    integers, logits = run_integers(session, folder, TEXTS)
    local, expected = record_integers(model, TEXTS, integers)
    steps = torch.cat([(integers[name] - local[name]).abs().flatten() for name in local])
    assert integers.keys() == local.keys()
    assert steps.max() <= 1
    wide = max(codes.max() for codes in integers.values()) > 255
    # Integers of 16 bits are so fine that the order of sums decides more often: 7e-4. Of 8 bits: at most 3e-5.
    assert (steps > 0).double().mean() < (2e-3 if wide else 1e-4)
    assert (logits - expected).abs().max() < 1e-6 * expected.abs().max()  # measured: 3.5e-7


@pytest.mark.parametrize("exported", ["W8A8"], indirect=True)
@torch.no_grad()
def test_perplexity_is_compared_by_window(exported):
    model, session, _ = exported
    windows, start = TEXTS[:3], [5]
    logits = [torch.from_numpy(session.read([start + window])[0][0, 1:-1]) for window in windows.tolist()]
    losses = torch.stack([cross_entropy(*pair) for pair in zip(logits, windows[:, 1:], strict=True)])
    torch.testing.assert_close(measure_losses(session, windows, 5).float(), losses)
    table = compare_perplexity(deepcopy(model).double(), session, {"news": windows}, {"news": losses + 0.01}, 5)
    first, second = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert [cell.strip() for cell in first[:3]] == ["ONNX Runtime", "news", "3 x 14"]
    assert float(first[3]) == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert first[5].strip() == "-1.00% ± 0.00%"
    assert second[5].startswith(("-0.9", "-1.0"))  # the order of sums, and at most a few integers


def test_the_graph_is_valid_and_says_that_it_holds_no_prefix(exported):
    _, session, folder = exported
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]
    assert {node.domain for node in graph.graph.node} == {""}
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["prefixquant.prefix"] == "not in this file; 3 positions, the past of the first call"
    manifest = read_json(folder / "manifest.json")
    assert manifest["prefix"]["token_ids"] == [7, 9, 0]
    assert manifest["prefix"]["in_the_graph"] is False
    with np.load(folder / "past.npz") as arrays:
        assert {array.shape[2] for array in arrays.values()} == {3}
        assert session._prefix.keys() == set(arrays)


def test_every_site_has_a_pair_of_the_dtype_that_the_settings_ask_for(exported):
    _, session, folder = exported
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    dtypes = {entry.name: onnx.TensorProto.DataType.Name(entry.data_type) for entry in graph.initializer}
    pairs = [dtypes[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    weights = [
        dtypes[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in dtypes
    ]
    spec = session.manifest["blocks"]["block"]["sites"]
    blocks = len(session._parts) // 2
    caches = blocks * sum(spec.get(site, {}).get("bits", 16) == 8 for site in ("key", "value"))
    kind = {8: "UINT8", 16: "UINT16"}[spec["mlp_input"]["bits"]]
    kind = "INT8" if spec["mlp_input"]["symmetric"] else kind
    assert len(pairs) == blocks * 4 + caches
    assert pairs.count(kind) == blocks * 4 + (caches if kind == "INT8" else 0)
    signed = "INT" if spec["q_proj"]["symmetric"] else "UINT"
    assert weights == [f"{signed}{spec['q_proj']['bits']}"] * (blocks * 7)


@pytest.mark.parametrize("exported", ["W8A8"], indirect=True)
@torch.no_grad()
def test_command_and_documented_script_continue_as_the_model_in_transformers(exported, monkeypatch, capsys):
    model, _, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer("The house", return_tensors="pt")["input_ids"]
    whole = model.generate(token_ids, max_new_tokens=32, do_sample=False)
    expected = tokenizer.decode(whole[0, token_ids.shape[1] :])
    monkeypatch.setattr("sys.argv", ["prefixquant", "onnx-generate", str(folder), "The house"])
    dispatch()
    assert capsys.readouterr().out == expected + "\n"
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/onnx.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(script.replace("artifacts/export_formats/onnx", str(folder)).replace("Once upon a time", "The house"), {})
    assert capsys.readouterr().out == expected + "\n"


def test_texts_that_do_not_fit_static_sizes_are_refused(exported):
    _, session, _ = exported
    if session.step is None:
        assert len(session.generate(TEXTS[0].tolist(), 3)) == 3
        with pytest.raises(OnnxFolderError, match="the prompt is empty"):
            session.generate([], 3)
        return
    with pytest.raises(OnnxFolderError, match=r"export\.onnx\.cache_length=24: 22 tokens do not fit, 21 do"):
        session.read([[5] * 22])


@torch.no_grad()
def test_a_graph_filled_with_the_tensors_of_another_model_computes_that_model(sources, tmp_path):
    four = EIGHT | {"weights.bits": 4}
    first, _ = make_quantized(sources, tmp_path / "first", "llama_small", EIGHT, (), **MERGED)
    second, _ = make_quantized(sources, tmp_path / "second", "llama_small", four, (7, 9, 0), **MERGED, r2="random")
    signed = EIGHT | {"activations.symmetric": True}
    other, _ = make_quantized(sources, tmp_path / "other", "llama_small", signed, (), **MERGED)
    logging.disable(logging.DEBUG)
    graph = build_graph(first, optimize=False)
    logging.disable(logging.NOTSET)
    message = r"zero_point: the graph has no tensor of this name, shape \[\] and dtype torch\.int8"
    with pytest.raises(GraphMismatchError, match=message):
        fill_graph_(graph, other)
    fill_graph_(graph, second)
    kv = load_prefix_kv(second.folder, second.stage)
    write_onnx(second, kv, tmp_path, params=OnnxParams(), header=make_header("export", {}), graph=graph)
    expected = assemble_model(second, kv)(TEXTS).logits.numpy()
    assert_same(OnnxModel(tmp_path, threads=1).read(TEXTS.numpy())[0], expected)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(OnnxFolderError, match=r"there is no manifest\.json\. Use a folder that `export\.formats"):
        OnnxModel(tmp_path)
