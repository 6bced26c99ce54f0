"""Programs that measure, by topic. Each is started with `python -m` and explains itself with `--help`.

    quality       perplexity of settings, prefixes, number formats, sites; by position
    speed         time and memory of stages, of fine-tuning, of transforms, of the exported model; large models
    serving       vLLM against transformers
    robustness    random damage to everything that users hand in
    peers         this project and other tools on the same model, text and machine

`workspace.py` runs stages with changed params, each result once. `tiny_models.py` and `tiny_gguf.py` make tiny random
models, which the tests use too. A benchmark imports from pipeline/ and stages/, never from tests/.
"""
