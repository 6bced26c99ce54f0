"""vLLM's HTTP server, asked by the `openai` client, generates what transformers does with a tiny exported model."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from pipeline.inference.loading import load
from tests.conftest import ROOT
from tests.serving.test_vllm import ENVIRONMENT, MODELS, make_served

pytestmark = pytest.mark.serving
NAME, PREFIX, NEW = (
    "llama, weights alone",
    3,
    24,
)  # without activation quantizers, no value lies on the edge between two integers
PROMPTS = ["the river", "a theory of numbers was", "in the year of the city and the war, it was", "one two three"]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served"), *MODELS[NAME][:4])


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    with serve(folder, tmp_path_factory.mktemp("server") / "log") as url:
        yield make_client(url)


def make_client(url):
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)


@contextmanager
def serve(folder, log, *options):
    """Start a server, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    command += ["--chat-template", TEMPLATE, "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url, server, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@torch.no_grad()
def continue_greedily(model, ids):
    """Return token ids and their log-probabilities by transformers."""
    made, chosen = list(ids), []
    for _ in range(NEW):
        log_p = model(torch.tensor([made])).logits[0, -1].log_softmax(-1)
        made.append(int(log_p.argmax()))
        chosen.append(log_p.max().item())
    return made[len(ids) :], chosen


EXTRA = {"ignore_eos": True, "return_token_ids": True}


def ask_together(client, prompts):
    def ask(prompt):
        return client.completions.create(
            model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, logprobs=0, extra_body=EXTRA
        )

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, prompts))


def test_completions_equal_transformers_alone_and_together(folder, client):
    """Prompts are texts and token ids, in four requests at a time. Tokens and log-probabilities are compared."""
    model, tokenizer = load(folder)
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    expected = [continue_greedily(model, prompt_ids) for prompt_ids in ids]

    answers = ask_together(client, PROMPTS + ids)
    for answer, prompt_ids, (tokens, log_p) in zip(answers, ids * 2, expected * 2, strict=True):
        assert answer.choices[0].token_ids == tokens
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(log_p, abs=1e-4)
        assert answer.usage.prompt_tokens == len(prompt_ids) + PREFIX


def test_two_engines_share_the_requests(folder, tmp_path):
    """vLLM's own data parallelism: both engines load one folder, and each has its own cache."""
    model, tokenizer = load(folder)
    expected = {prompt: continue_greedily(model, tokenizer(prompt)["input_ids"])[0] for prompt in PROMPTS}
    with serve(folder, tmp_path / "log", "--data-parallel-size", "2") as url:
        for prompt, answer in zip(PROMPTS * 2, ask_together(make_client(url), PROMPTS * 2), strict=True):
            assert answer.choices[0].token_ids == expected[prompt]
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    answered = re.findall(r'^vllm:prompt_tokens_total\{engine="(\d)".* ([0-9.e+]+)$', metrics, flags=re.MULTILINE)
    assert {engine for engine, tokens in answered if float(tokens) > 0} == {"0", "1"}


def test_a_chat_is_rendered_by_the_template(folder, client):
    model, tokenizer = load(folder)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPTS[1]}],
        max_tokens=NEW,
        temperature=0,
        extra_body=EXTRA,
    )
    tokens, _ = continue_greedily(model, tokenizer(f"user: {PROMPTS[1]}\n")["input_ids"])
    assert answer.choices[0].token_ids == tokens


def test_a_refused_request_is_a_bad_request_and_the_server_continues(folder, client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="of max_model_len=256 are the prefix's"):
        client.completions.create(model="tiny", prompt=list(range(1, 255)), max_tokens=1)
    assert client.completions.create(model="tiny", prompt=[5, 6], max_tokens=1).usage.completion_tokens == 1
