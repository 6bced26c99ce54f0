"""The exported ONNX folder at work in ONNX Runtime: the prefix is the past of the first call.

    model = OnnxModel(Path("artifacts/export_formats/onnx"))
    logits, state = model.read([[510, 4226]])          # [1, 2, V]
    logits, state = model.read([[314]], state)         # the next token

It needs onnxruntime, numpy and safetensors. Graphs with static sizes are called in pieces of that many tokens. Their
past is full of unused positions, which the mask hides.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline.interop.onnx_layout import GRAPH, MANIFEST, PAST, SESSION_OPTIONS, list_parts
from pipeline.runtime.errors import PipelineError

_DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class OnnxFolderError(PipelineError):
    """A folder is not an exported ONNX folder, or a text does not fit its static sizes."""


@dataclass(frozen=True)
class OnnxState:
    """Everything that was read so far.

    Attributes:
        past: name of a graph's input -> keys or values [B, kv heads, positions, d].
        mask: int64 [B, positions], 0 for padding and unused positions; the prefix is counted.
        lengths: int64 [B], how many tokens each text has, without padding and prefix.
    """

    past: dict[str, NDArray[Any]]
    mask: NDArray[np.int64]
    lengths: NDArray[np.int64]


def make_options() -> onnxruntime.SessionOptions:
    """Return session options by which ONNX Runtime computes the graph's own numbers."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # without its advice on operators that run as floats
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    return options


class OnnxModel:
    """A graph with its prefix.

    Attributes:
        session: ONNX Runtime's session.
        manifest: the folder's manifest.
        prefix_tokens: P.
    """

    def __init__(self, folder: Path, threads: int | None = None, profile: Path | None = None) -> None:
        """Load a folder.

        Args:
            threads: threads of one operator; None: ONNX Runtime's choice.
            profile: beginning of the name of a file with the time of every operator, or None.

        Raises:
            OnnxFolderError: the folder lacks a file.
        """
        for name in (MANIFEST, GRAPH):
            if not (folder / name).is_file():
                raise OnnxFolderError(
                    f"{folder}: there is no {name}. Use a folder that `export.formats: [onnx]` wrote, such as "
                    "artifacts/export_formats/onnx."
                )
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.prefix_tokens: int = self.manifest["prefix"]["tokens"]
        self._prefix = load_file(folder / PAST) if self.prefix_tokens else {}
        options = make_options()
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
        inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self._parts = list_parts(sum(name.startswith("past_key_values.") for name in inputs) // 2)
        self._inputs = [inputs[f"past_key_values.{part}"] for part in self._parts]
        self.holds_codes = any(name.startswith("prefix.") for name in inputs)
        shapes = self.manifest["shapes"]
        self.step: int | None = None if shapes is None else shapes["sequence"]
        self.capacity: int | None = None if shapes is None else shapes["past"]

    def start(self, batch: int) -> OnnxState:
        """Return the state before any text: the prefix."""
        prefix = 0 if self.holds_codes else self.prefix_tokens
        unused = 0 if self.capacity is None else self.capacity - prefix
        past = {}
        for part, entry in zip(self._parts, self._inputs, strict=True):
            _, heads, _, width = entry.shape
            empty = np.zeros((batch, heads, unused, width), _DTYPES[entry.type])
            if prefix:
                rows = self._prefix[f"past_key_values.{part}"].repeat(batch, 0)
                empty = np.concatenate((empty, rows), 2)
            past[entry.name] = empty
        mask = np.concatenate((np.zeros((batch, unused)), np.ones((batch, prefix))), 1).astype(np.int64)
        return OnnxState(past, mask, np.zeros(batch, np.int64))

    def read(
        self,
        token_ids: Sequence[Sequence[int]] | NDArray[np.int64],
        state: OnnxState | None = None,
        mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], OnnxState]:
        """Read tokens [B, T] after `state`, and return logits [B, T, V] and the state after them.

        Args:
            state: None for the beginning of texts.
            mask: [B, T], 0 for padding on the left; None: no padding.

        Raises:
            OnnxFolderError: a graph with static sizes gets several texts, padding, or more tokens than fit.
        """
        tokens = np.asarray(token_ids, np.int64)
        state = self.start(len(tokens)) if state is None else state
        mask = np.ones_like(tokens) if mask is None else mask
        if self.step is None:
            return self._call(tokens, mask, state)
        self._check_static(tokens, mask, state)
        logits = []
        for first in range(0, tokens.shape[1], self.step):
            piece = tokens[:, first : first + self.step]
            count = piece.shape[1]
            padding = ((0, 0), (0, self.step - count))  # on the right: no token of the text attends to it
            scores, after = self._call(np.pad(piece, padding), np.pad(np.ones_like(piece), padding), state)
            past = {name: whole[:, :, count : count + self.capacity] for name, whole in after.past.items()}
            logits.append(scores[:, :count])
            state = OnnxState(past, after.mask[:, count : count + self.capacity], state.lengths + count)
        return np.concatenate(logits, 1), state

    def _check_static(self, tokens: NDArray[np.int64], mask: NDArray[np.int64], state: OnnxState) -> None:
        assert self.capacity is not None, "graphs with a static sequence have a static past"
        room = self.capacity - (0 if self.holds_codes else self.prefix_tokens)
        if len(tokens) != 1 or not mask.all():
            raise OnnxFolderError(
                f"{len(tokens)} texts with padding={not mask.all()}: a graph with static sizes reads one text without "
                "padding. Call it once for each text, or export with export.onnx.sequence_length empty."
            )
        if state.lengths[0] + tokens.shape[1] > room:
            raise OnnxFolderError(
                f"export.onnx.cache_length={self.capacity}: {state.lengths[0] + tokens.shape[1]} tokens do not fit, "
                f"{room} do. Shorten the text, or export with a longer cache."
            )

    def _call(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], state: OnnxState
    ) -> tuple[NDArray[np.float32], OnnxState]:
        """Run the graph once; the state that it returns holds all positions of `present`."""
        logits, *present = cast(list[NDArray[Any]], self.session.run(None, self.make_feed(tokens, mask, state)))
        names = [entry.name for entry in self._inputs]
        whole = np.concatenate((state.mask, mask), 1)
        return logits, OnnxState(dict(zip(names, present, strict=True)), whole, state.lengths + mask.sum(1))

    def make_feed(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], state: OnnxState | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs for one call: tokens and mask [B, T] after `state`, or after the prefix alone."""
        state = self.start(len(tokens)) if state is None else state
        places = np.maximum(state.lengths[:, None] + mask.cumsum(1) - 1, 0)
        whole = np.concatenate((state.mask, mask), 1)
        feed = {"input_ids": tokens, "attention_mask": whole, "position_ids": places + self.prefix_tokens, **state.past}
        if self.holds_codes:
            prefix = np.ones((len(tokens), self.prefix_tokens), np.int64)
            feed["attention_mask"] = np.concatenate((prefix, whole), 1)
            for part, entry in zip(self._parts, self._inputs, strict=True):
                empty = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
                feed[f"prefix.{part}"] = self._prefix.get(f"past_key_values.{part}", empty)
        return feed

    def generate(self, token_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """Return the most likely continuation of one text, without the text.

        Raises:
            OnnxFolderError: the text is empty, or does not fit static sizes.
        """
        if not token_ids:
            raise OnnxFolderError("the prompt is empty. Give some text to continue.")
        logits, state = self.read([token_ids])
        new: list[int] = []
        while True:
            token = int(logits[0, -1].argmax())
            if token in stop_ids:
                return new
            new.append(token)
            if len(new) == max_new_tokens:
                return new
            logits, state = self.read([[token]], state)
