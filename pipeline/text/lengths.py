"""The length and number of windows where `calibration.*.length` is `auto`.

In a layer with a sliding window of W positions the prefix leaves after W positions, and activations change. So windows
of a model with such layers go beyond W by W positions or by the default length, whichever is fewer:

    W        search          train           evaluation
    none     64 x 256        16 x 512         4 x 1024
    512      21 x 768         8 x 1024        4 x 1024
    4096      4 x 4352        2 x 4608        2 x 5120

There are as many tokens as `windows` windows of the default length have, but at least two windows, and at least one of
each corpus.
"""

from pipeline.text.params import CalibrationParams, EvaluationSplitParams, SplitParams, split_windows

DEFAULT_LENGTHS = {"search": 256, "train": 512, "end_to_end": 512, "validation": 512, "evaluation": 1024}
_FEWEST_WINDOWS = 2  # one to calibrate and one to judge; a standard error needs two as well


def reach_beyond(window: int | None, length: int) -> int:
    """Return a length of at least `length` that goes beyond a sliding window (None: there is none).

    512, 256 -> 768; 512, 1024 -> 1024; 4096, 512 -> 4608.
    """
    return length if window is None else max(length, window + min(window, length))


def choose_length(name: str, split: SplitParams | EvaluationSplitParams, *, window: int | None, room: int) -> int:
    """Return the length of a split's windows in tokens.

    Args:
        name: name of the split, such as `train`.
        window: the model's largest sliding window, or None.
        room: positions that the model has for a text after prefix and start token. `auto` stays within it. Where the
            window is as large as that, no prefix ever leaves it, and the default length is enough.
    """
    if split.length != "auto":
        return split.length
    reached = window if window is not None and window < room else None
    return min(reach_beyond(reached, DEFAULT_LENGTHS[name]), room)


def count_windows(name: str, split: SplitParams | EvaluationSplitParams, windows: int, length: int) -> int:
    """Return how many windows of `length` tokens a split gets in place of `windows` ones of its default length.

    A split with a fixed length gets `windows`.
    """
    if split.length != "auto":
        return windows
    count = max(round(windows * DEFAULT_LENGTHS[name] / length), min(_FEWEST_WINDOWS, windows))
    if isinstance(split, SplitParams):
        while count < windows and not all(split_windows(count, split.corpora).values()):
            count += 1
    return min(count, windows)


def find_short_windows(calibration: CalibrationParams, window: int | None) -> list[str]:
    """Return a line for each split whose fixed length stays within a sliding window."""
    if window is None:
        return []
    return [
        f"calibration.{name}.length={split.length}: in layers with sliding_window={window}, these windows read the "
        f"prefix at every position, so what happens after it leaves is not measured. Use auto, or more than {window}"
        for name, split in calibration.splits().items()
        if split.length != "auto" and split.length <= window
    ]
