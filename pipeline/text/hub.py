"""The corpora on the Hugging Face Hub that have a name in this project."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HubCorpus:
    """The place of a corpus on the hub, and the use of its splits.

    Attributes:
        repository, config, revision: as `datasets.load_dataset` takes them.
        splits: this project's split -> the hub's. A missing split is dealt from `train`.
        text_field: the column that holds the text.
        data_files: split -> the file that is read, where not all are.
        rows_per_document: the number of rows (sentences) that are joined to a document.
        heading: a pattern. Where there is one, every row that it matches starts a new document.
    """

    repository: str
    config: str | None
    revision: str
    splits: dict[str, str]
    text_field: str = "text"
    data_files: dict[str, str] | None = None
    rows_per_document: int = 1
    heading: str | None = None


# `datasets` refuses script datasets from version 4 on. They are taken from the hub's own conversion to parquet.
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
