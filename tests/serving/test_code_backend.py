"""vLLM with a cache of packed codes computes what transformers does, in a quarter of the memory of bfloat16."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from tests.conftest import ROOT
from tests.serving.test_vllm import ENVIRONMENT, MODELS, ONLINE, WIDE_SIZES, compare, make_served

pytestmark = pytest.mark.serving
CODES = MODELS | {
    "llama, cache of 8 bits": (
        LlamaConfig(**WIDE_SIZES),
        {"keys.bits": 8, "values.bits": 8, "values.symmetric": False},
        [7, 9, 0],
        ONLINE,
        None,
    )
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return name -> exported folder. A folder is made when it is first asked for."""

    class Folders(dict):
        def __missing__(self, name):
            self[name] = make_served(tmp_path_factory.mktemp("codes"), *CODES[name][:4])
            return self[name]

    return Folders()


@pytest.mark.parametrize(
    "name", ["llama, static", "llama, cache of 8 bits", "qwen3, asymmetric groups", "qwen3, every layer slides"]
)
def test_a_cache_of_codes_computes_what_transformers_does(exports, name):
    """Texts are batched, and cut into chunks of 96 tokens. The second run reads cached blocks."""
    parity = compare(exports, name, "--eager", "--packed-cache")
    assert parity["median_block"] <= 1e-5
    assert parity["rounded_otherwise"] <= 0.02


def test_layers_without_rope_and_layers_that_slide_have_codes(exports):
    """In EXAONE 4 the sliding layers turn keys, and the global layers have no RoPE."""
    compare(exports, "exaone4", "--eager", "--packed-cache")


def test_compiled_blocks_write_and_read_codes(exports):
    compare(exports, "llama, static", "--packed-cache")


def test_two_processes_have_codes_of_their_own_heads(exports):
    compare(exports, "llama, static", "--eager", "--processes", "2", "--packed-cache")


def run(program):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_small_pages_are_preempted_shared_and_reused(exports):
    """A cache for a third of the texts preempts some of them, and all get the tokens that they get in a large one."""
    program = f"""
import json
from vllm import LLM, SamplingParams
engines = []  # all are held: the end of one would end the process groups of the next
def start(size, packed=True):
    engines.append(LLM({str(exports["llama, static"])!r}, dtype="float32", enforce_eager=True, max_model_len=256,
        max_num_seqs=16, max_num_batched_tokens=64, block_size=32, kv_cache_memory_bytes=size, disable_log_stats=False,
        additional_config={{"packed_cache": packed}}))
    return engines[-1]
def count(llm):
    return llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
texts = [{{"prompt_token_ids": [5 + place] + list(range(40, 110))}} for place in range(6)]
texts += texts[:2]
sampling = SamplingParams(n=2, temperature=1, top_k=1, max_tokens=80, ignore_eos=True)
values, tokens = {{"unpacked": count(start(2**22, packed=False))}}, []
for size in (2**22, 2**17):
    llm = start(size)
    values.setdefault("packed", count(llm))
    tokens.append([list(one.token_ids) for text in llm.generate(texts, sampling) for one in text.outputs])
    metrics = {{metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}}
values["preemptions"] = metrics["vllm:num_preemptions"]
values["hits"] = metrics["vllm:prefix_cache_hits"]
values["texts"] = len(tokens[0])
values["equal"] = sum(one == other for one, other in zip(*tokens))
print(json.dumps(values))
"""
    values = run(program)
    assert 7.8 <= values["packed"] / values["unpacked"] <= 8.2  # states are float32
    assert values["preemptions"] > 0
    assert values["hits"] > 0
    assert values["texts"] == 16
    assert values["equal"] >= 15


def test_settings_without_codes_are_refused_at_start(exports):
    program = f"""
import json
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
from pipeline.serving.quantization import check_engine
messages = []
for options, changes in (
    ({{"additional_config": {{"packed_cache": "yes"}}}}, ()),
    ({{"additional_config": {{"packed_cache": True}},
      "kv_transfer_config": {{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}}}}, ()),
    ({{"additional_config": {{"packed_cache": True}}}}, ("decode_context_parallel_size",)),
):
    config = EngineArgs(model={str(exports["llama, static"])!r}, dtype="float32", enforce_eager=True, **options)
    config = config.create_engine_config()
    for name in changes:
        setattr(config.parallel_config, name, 2)
    try:
        check_engine(config)
    except ValueError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
    messages = run(program)
    assert len(messages) == 3
    assert messages[0].startswith("packed_cache='yes': expected true or false")
    assert "packed_cache=true with kv_transfer_config: " in messages[1]
    assert "packed_cache=true with decode_context_parallel_size=2: " in messages[2]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral, keys before RoPE, 8 bits", "the cache cannot hold codes, because of keys.before_rope=true"),
        ("gemma2", "attention over codes cannot cap scores (at 4.0)"),
    ],
)
def test_a_model_without_codes_is_refused(exports, name, reason):
    program = f"""
from vllm import LLM
LLM({str(exports[name])!r}, dtype="float32", enforce_eager=True,
    additional_config={{"packed_cache": True}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"packed_cache=true: {reason}" in done.stderr
