"""The library: rooms of one concept each, in one order. A module imports from its own room and from rooms before it.

    runtime       used by every run: errors, artifacts, progress, ranks, memory. Computes nothing
    numerics      operations on one tensor: Hadamard transforms, quantizers, GPTQ, packing
    kernels       CPU operators of exported models that are faster than torch's
    models        families, checkpoints
    importing     models of other programs, read and checked
    text          corpora and token windows
    blocks        one decoder block at work: quantized, cached, walked through
    inspection    checks and measurements that walk: the import gate, the start token, saturation
    rotation      R1 to R5: merged into weights, checked
    quantization  choosing every scale and rounding the weights
    training      the training loop, block by block and end to end
    prefix        outlier tokens, the prefix found or trained
    inference     a model that runs with its prefix, from a checkpoint or an exported folder
    export        the folder a user loads
    interop       the model in formats of other programs
    evaluation    perplexity, divergence, tasks
    planning      memory and disk that a stage will need
    pictures      activations, plots, the report
    serving       the exported folder in vLLM

`params.py` puts the groups of params.yaml together. `presets.py` and `experiments.py` are commands of the Makefile. The
other modules here are short names that users type.
docs/architecture.md follows data and three settings through the rooms.
"""
