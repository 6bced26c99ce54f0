"""Pack the quantized model into a folder anyone can load in one call.

Reads   artifacts/finetuning/ (with the prefix in use), artifacts/model/ (its size); for the model card
        metrics/evaluation/ and artifacts/evaluation/*_samples.json (original, finetuning), artifacts/sources/model.json
Writes  artifacts/export/, artifacts/export_formats/ (formats of others, as asked for), metrics/export.json
Packaged model: a few seconds, 1 GiB.
"""

from pathlib import Path

from pipeline.blocks.prefix_kv import PREFIX
from pipeline.export.folder import export_model
from pipeline.interop.other_formats import write_formats
from pipeline.models.checkpoint import Checkpoint
from pipeline.planning.disk import OtherFiles
from pipeline.planning.export import plan_export
from pipeline.planning.need import Need
from pipeline.runtime.artifacts import load_json, load_tensors, make_header, read_header
from pipeline.runtime.sources import read_json
from pipeline.text.windows import unpack_start_token
from stages.opening import Run, open_stage

SOURCE = Path("artifacts/sources/model.json")
MODEL = Path("artifacts/model")
FINETUNING = Path("artifacts/finetuning")
EVALUATIONS = {name: Path(f"metrics/evaluation/{name}.json") for name in ("original", "finetuning")}
SAMPLES = {name: Path(f"artifacts/evaluation/{name}_samples.json") for name in EVALUATIONS}
EXPORT = Path("artifacts/export")
FORMATS = Path("artifacts/export_formats")


def main(run: Run) -> None:
    settings, checkpoint = run.params.export, Checkpoint(FINETUNING, "finetuning")
    prefix, _ = load_tensors(FINETUNING / PREFIX, "finetuning")
    results = {name: load_json(path, f"evaluation@{name}") for name, path in EVALUATIONS.items()}
    samples = {name: load_json(path, f"evaluation@{name}") for name, path in SAMPLES.items()}
    inputs = {"finetuning": checkpoint.header, "model": read_header(MODEL, "model")}
    header = make_header("export", settings.model_dump(include={"max_shard_size"}), inputs)
    # First, because it refuses models that a format cannot express.
    write_formats(
        checkpoint,
        prefix.get("kv"),
        FORMATS,
        formats=settings.formats,
        drop=settings.drop,
        max_shard_size=settings.max_shard_size,
        header=header,
        text_start_token_id=unpack_start_token(prefix),
        prefix_token_ids=prefix["token_ids"].tolist(),
        onnx=settings.onnx,
    )
    metrics = export_model(
        checkpoint,
        prefix,
        EXPORT,
        original=MODEL,
        max_shard_size=settings.max_shard_size,
        header=header,
        results=results,
        samples=samples,
        source=read_json(SOURCE),
    )
    run.metrics.update(metrics)


def plan(run: Run) -> Need:
    checkpoint = Checkpoint(FINETUNING, "finetuning")
    return plan_export(checkpoint, OtherFiles.measure(checkpoint), run.params.export)


if __name__ == "__main__":
    open_stage("export", main, __doc__, plan)
