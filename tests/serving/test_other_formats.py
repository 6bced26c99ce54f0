"""vLLM serves the compressed-tensors folder with its own kernels, and computes the evaluated logits."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.importing.import_model import import_model
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.other_formats import write_formats
from pipeline.runtime.artifacts import make_header
from tests.conftest import ROOT, make_tokenizer, randomize_
from tests.inference.test_prefixed_model import make_quantized
from tests.interop.test_other_formats import PLAIN
from tests.serving.test_vllm import ENVIRONMENT, WIDE_SIZES

pytestmark = pytest.mark.serving
KINDS = {
    "W8A8 static asymmetric": {"weights.bits": 8, "activations.bits": 8, "activations.symmetric": False},
    "W4A16 groups": {"weights.bits": 4, "weights.group_size": 32},
}
TEXTS = torch.randint(2, 320, (8, 32), generator=torch.Generator().manual_seed(3))
PROGRAM = """
import json, sys
from vllm import LLM
from benchmarks.serving.parity import score_served
llm = LLM(sys.argv[1], dtype=sys.argv[3], enforce_eager=True, max_model_len=64)
print(json.dumps([scores.tolist() for scores in score_served(llm, json.loads(sys.argv[2]))]))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a model whose sizes vLLM has kernels for, with logits as far apart as those of a trained model."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    model = randomize_(AutoModelForCausalLM.from_config(LlamaConfig(**WIDE_SIZES)))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(root / "source")
    make_tokenizer().save_pretrained(root / "source")
    import_model(str(root / "source"), None, torch.float32, root / "wide")
    return {"wide": root / "wide"}


@pytest.mark.parametrize(("kind", "dtype"), [("W8A8 static asymmetric", "float32"), ("W4A16 groups", "bfloat16")])
@torch.no_grad()
def test_vllm_computes_the_evaluated_logits(wide, tmp_path, kind, dtype):
    """vLLM's kernel for W4A16 computes in bfloat16. It comes as near as transformers in bfloat16."""
    checkpoint, _ = make_quantized(wide, tmp_path, "wide", PLAIN | KINDS[kind], (), r4="identity")
    write_formats(
        checkpoint,
        None,
        tmp_path / "formats",
        formats=["compressed-tensors"],
        drop=[],
        max_shard_size="5GB",
        header=make_header("export", {}),
    )
    folder = tmp_path / "formats" / "compressed-tensors"
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(TEXTS.tolist()), dtype]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    served = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    expected = find_log_p(assemble_model(checkpoint, None))
    if dtype == "float32":
        assert (served - expected).abs().mean() <= 1e-3  # measured: 6e-5
    else:
        rounded = find_log_p(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        assert (served - expected).abs().mean() <= 1.2 * (rounded - expected).abs().mean()  # measured: 0.029 and 0.032


def find_log_p(model):
    log_p = model(TEXTS).logits[:, :-1].float().log_softmax(-1)
    return log_p.gather(2, TEXTS[:, 1:, None]).squeeze(2)
