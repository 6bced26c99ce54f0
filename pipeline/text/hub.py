"""Corpora on the Hugging Face Hub that have a name here, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus lives on the hub and which of its splits serves for what.

    `splits` maps ours to theirs; a split that is missing is dealt from `train`. `rows_per_document` > 0 joins that
    many rows (sentences) to a document; `heading` starts a new document at every row it matches.
    """

    repository: str
    config: str | None
    revision: str
    splits: dict[str, str]
    text_field: str = "text"
    data_files: dict[str, str] | None = None
    rows_per_document: int = 1
    heading: str | None = None


# Script datasets are refused by datasets >= 4: those come from the hub's converted parquet revision.
HUB_CORPORA = {
    "wikitext2": HubCorpus(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "main",
        {"train": "train", "validation": "validation", "test": "test"},
        heading=r"^ = [^=].* = \n?$",
    ),
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "refs/convert/parquet",
        {"train": "train", "validation": "validation", "test": "test"},
        text_field="sentence",
        rows_per_document=50,
    ),
    # The field calibrates on the first train shard and evaluates on the first validation shard.
    "c4": HubCorpus(
        "allenai/c4",
        None,
        "main",
        {"train": "train", "test": "validation"},
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "pile": HubCorpus("mit-han-lab/pile-val-backup", None, "main", {"train": "validation"}),
    "redpajama": HubCorpus(
        "togethercomputer/RedPajama-Data-1T-Sample", "plain_text", "refs/convert/parquet", {"train": "train"}
    ),
}
