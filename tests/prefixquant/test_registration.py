"""`import prefixquant` is fast, and transformers then loads exported folders."""

import json
import subprocess
import sys

import pytest
import torch

from prefixquant import registration
from tests.conftest import ROOT
from tests.export.test_folder import TEXT, make_export

# Each program prints the logits of the export whose folder is the argument.
BEGIN = """
import json, sys
import prefixquant
assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
"""
END = """
import torch
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""
PROGRAMS = {
    "transformers after prefixquant, next to its function pipeline": BEGIN
    + """
from transformers import AutoModelForCausalLM, pipeline
assert "pipeline.hf" not in sys.modules and callable(pipeline)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
""",
    "transformers before prefixquant": """
import json, sys
import transformers.quantizers.auto
from transformers import AutoModelForCausalLM
import prefixquant
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
""",
    "pipeline.hf as well": BEGIN
    + """
import transformers.quantizers.auto
import pipeline.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
""",
    "a function pipeline that is used": """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
import prefixquant
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
(row,) = generate("The house", max_new_tokens=5, do_sample=False)
ids = model.generate(**tokenizer("The house", return_tensors="pt"), max_new_tokens=5, do_sample=False)
assert row["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
assert pipeline.__module__.startswith("transformers")
""",
    "every module by its whole name": """
import json, sys
import pipeline.hf
from transformers import AutoModelForCausalLM, pipeline as make_pipeline
import pipeline.generate
assert pipeline.hf.PrefixQuantizer and callable(make_pipeline)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
""",
    "prefixquant.load": BEGIN
    + """
model, tokenizer = prefixquant.load(sys.argv[1])
assert len(tokenizer("The house")["input_ids"]) > 1
""",
}


@pytest.fixture(scope="module")
def export(imported, tmp_path_factory):
    """Return an exported folder and the logits of the model that it was made of."""
    folder, evaluated, _ = make_export(imported, tmp_path_factory.mktemp("registration"))
    with torch.no_grad():
        return folder, evaluated(TEXT).logits


@pytest.mark.parametrize("order", PROGRAMS)
def test_exports_load_in_every_order_of_imports(order, export):
    folder, logits = export
    program = PROGRAMS[order] + END
    arguments = [sys.executable, "-c", program, str(folder), json.dumps(TEXT.tolist())]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), logits)


def test_the_method_has_the_name_that_exports_have():
    from pipeline.inference.manifest import METHOD

    assert registration.METHOD == METHOD
