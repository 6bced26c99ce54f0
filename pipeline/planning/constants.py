"""Every fitted constant of the memory plans, with its meaning and its origin.

Plans count the code's allocations from the model's shapes. Only the rest is fitted: temporaries of
libraries, memory that an allocator keeps, and memory that several steps hold at the same time. There were five fits:

    CPU    2026-11-22, float32, two cores: the packaged model (`benchmarks.speed.finetuning`, `.stages`) and blocks of
           Llama-2-7B and Llama-3-70B (`benchmarks.speed.scaling`). docs/scaling.md compares plans with peaks.
    H100   2026-11-26, torch 2.11: blocks of Llama-2-7B, `benchmarks.speed.scaling`.
    H200   2026-11-26, torch 2.11: the 16 rows of docs/scaling.md, "Measured: on GPUs". tests/planning/test_plans.py
           checks that every plan is within 20 % of its row.
    LOGITS 2026-11-29, CPU, torch 2.13: peak of the function alone, with a vocabulary of 131,072.
    TIME   2026-11-30, two cores: the packaged model, default settings (metrics/runtime/), in plain forwards of 2.06 ms
           a token (docs/scaling.md). With `quantizer_init` and `rotation`, the forwards of docs/scaling.md for blocks
           of Llama-2-7B and Llama-3-70B too.

"Origin unknown": the value came with the code, and neither docs nor the history says how it was chosen.
"""

from pipeline.runtime.memory import GIB

# --- The process ---
# Host memory that libraries allocate when they are first used. CPU.
KERNELS = 0.1 * GIB
# Host memory of CUDA's libraries. H100.
CUDA_ON_HOST = 1.1 * GIB

# --- A batch on its way through a block, per token ---
# Float32 values of a forward pass without gradients, in widths of the residual stream and of the MLP. CPU.
FORWARD_HIDDEN, FORWARD_INNER = 6, 4
# Values that autograd keeps of a quantized block, in widths of the residual stream, the MLP and all keys. CPU.
GRAPH_HIDDEN, GRAPH_INNER, GRAPH_KEYS = 28, 10, 8
# Bytes of such a value: float32 and temporaries of the backward pass. CPU.
GRAPH_BYTES = 4.6
# The same while graphs of all blocks are kept. The temporaries belong to one block, so that the mean is lower. CPU.
KEPT_GRAPH_BYTES = 2.8
# Share of a graph that is kept where all weights are frozen (prefix training): one block, and all blocks. CPU.
FROZEN_GRAPH, FROZEN_KEPT_GRAPHS = 0.85, 0.75
# Share of a graph that is kept in bfloat16 autocast. H200.
AUTOCAST_GRAPH = 0.64
# Calibration batches that a GPU's allocator holds while prefixes are compared. H200 (an H100 held 2.6).
SIMULATED_BATCHES_ON_GPU = 1.8

# --- Copies of logits [positions, vocabulary] in float32 that exist at the same time ---
# KL divergence (training/divergence.py). CPU; LOGITS gave 8.2 with gradients and 7.1 without.
KL_LOGITS = 5
# Perplexity (evaluation/perplexity.py), alone and compared with the original. LOGITS gave 3.07 and 5.08.
PERPLEXITY_LOGITS, COMPARED_LOGITS = 3, 5
# Derivatives of predictions (quantization/sensitivity.py). LOGITS gave 6.4.
SENSITIVITY_LOGITS = 7

# --- Weights ---
# Copies of a model while a prefix is trained: as read from files and as it runs. CPU.
MODEL_COPIES = 2
# Bytes per weight of a quantized model under training: its integer, scales, the optimizer's state of them.
# Origin unknown (first plan of fine-tuning, 2026-11-22).
TRAINED_MODEL_BYTES = 1.05
# The same without integers, which are streamed. Origin unknown (2026-11-25).
STREAMED_MODEL_BYTES = 0.01
# Float32 copies of the largest weight in GPTQ. CPU.
GPTQ_COPIES = 5
# Hessians on a GPU while one is factorised: a CPU works in place, a GPU takes four more. H100.
FACTORISED_ON_GPU = 5

# --- Tensors that pass through the host's memory on their way to or from a GPU ---
# In embeddings: embedding and lm_head of a model in full precision, and of a quantized one. H200.
TABLES_THROUGH_HOST, QUANTIZED_TABLES_THROUGH_HOST = 1.65, 2
# In embeddings: those of both models, end to end. H200.
END_TO_END_TABLES_THROUGH_HOST = 3.2
# Bytes per weight of a quantized block on its way to a file: its integer and the float32 value of it. H200.
BLOCK_BYTES_THROUGH_HOST = 5
# The same of a block whose weights were trained, with their best state. H200.
TRAINED_BLOCK_BYTES_THROUGH_HOST = 8.8

# --- Tasks ---
# Tokens of a task's text, assumed. Origin unknown (first plan of evaluation, 2026-11-22).
TASK_TOKENS = 224

# --- Time, in plain forwards of the same tokens; see duration.py. TIME ---
# Merging rotations and checking them, in tokens for each width of the residual stream (3.9, 5.7 and 2.2).
ROTATION_TOKENS = 4
# Searching for outliers, and comparing candidates by benefit.
SEARCH_PASSES = 2.3
# Statistics, scales and GPTQ for a token; and GPTQ without regard to text, by the root of the residual stream's width.
QUANTIZER_INIT_PASSES, GPTQ_TOKENS = 3.8, 1450
# Forward, backward and the reference, for a token and an epoch.
TRAINING_PASSES = 4.0
# Perplexity of a model in full precision, and of a quantized one.
EVALUATION_PASSES, QUANTIZED_EVALUATION_PASSES = 0.9, 1.6
# Pictures of one variant.
PICTURE_PASSES = 1.05
# Tokens of an item of a task, in perplexity's passes; samples of text for the report included.
TASK_ITEM_TOKENS = 130
