"""Pack the quantized model into a folder anyone can load in one call.

Reads   artifacts/finetuning/ (with the prefix in use), artifacts/model/ (its size), metrics/evaluation/ (original and
        finetuning, for the model card)
Writes  artifacts/export/, artifacts/export_formats/ (formats of others, as asked for), metrics/export.json
Packaged model: a few seconds, 1 GiB.
"""

import json
from pathlib import Path

from pipeline.artifacts import load_tensors, make_header, read_header
from pipeline.checkpoint import Checkpoint
from pipeline.export import export_model, parse_size
from pipeline.memory import plan_export
from pipeline.params import load_params
from pipeline.prefix import PREFIX
from pipeline.progress import run_main, run_stage
from pipeline.standard_formats import write_formats
from stages.arguments import parse_arguments

PARAMS = Path("params.yaml")
MODEL = Path("artifacts/model")
FINETUNING = Path("artifacts/finetuning")
EVALUATIONS = {name: Path(f"metrics/evaluation/{name}.json") for name in ("original", "finetuning")}
EXPORT = Path("artifacts/export")
FORMATS = Path("artifacts/export_formats")
METRICS = Path("metrics/export.json")


def main() -> None:
    plan_only = parse_arguments(__doc__).plan
    params = load_params(PARAMS)
    if plan_only:
        print(plan_export(Checkpoint(FINETUNING, "finetuning"), parse_size(params.export.max_shard_size)).describe())
        return
    with run_stage("export", METRICS, params.runtime) as metrics:
        checkpoint = Checkpoint(FINETUNING, "finetuning")
        prefix, _ = load_tensors(FINETUNING / PREFIX, "finetuning")
        results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in EVALUATIONS.items()}
        inputs = {"finetuning": checkpoint.header, "model": read_header(MODEL, "model")}
        own = params.export
        header = make_header("export", own.model_dump(include={"max_shard_size"}), inputs)
        # First, since it refuses what a format cannot express.
        write_formats(checkpoint, prefix.get("kv"), FORMATS, own.formats, own.drop, own.max_shard_size, header)
        metrics |= export_model(checkpoint, prefix, MODEL, EXPORT, own.max_shard_size, header, results)


if __name__ == "__main__":
    run_main(main)
