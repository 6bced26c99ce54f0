"""The names of files, inputs and outputs of an exported ONNX folder, for writers and readers. Imports nothing."""

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
MANIFEST = "manifest.json"
PAST = "past.safetensors"
# ONNX Runtime turns weights of 4 and 8 bits whose input has other bits into MatMulNBits. By default it then rounds that
# input to 8 bits once more, in blocks, and computes another model (measured: logits off by 7 % of the largest).
SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}  # float32
PAST_ARRAYS = "past.npz"  # the same, for readers that have numpy alone


def list_parts(block_count: int) -> list[str]:
    """Return the names of keys and values, in the order of a graph's inputs: 0.key, 0.value, 1.key, …"""
    return [f"{index}.{part}" for index in range(block_count) for part in ("key", "value")]


def name_inputs(block_count: int, has_prefix_inputs: bool) -> list[str]:
    """Return the names of a graph's inputs in their order.

    Args:
        has_prefix_inputs: the prefix has inputs of its own, because the past holds integers.
    """
    parts = list_parts(block_count)
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)]
    return names + ([f"prefix.{part}" for part in parts] if has_prefix_inputs else [])


def name_outputs(block_count: int) -> list[str]:
    """Return the names of a graph's outputs in their order."""
    return ["logits", *(f"present.{part}" for part in list_parts(block_count))]
