"""vLLM against transformers on one exported folder: `python -m benchmarks.serving.parity FOLDER`."""
