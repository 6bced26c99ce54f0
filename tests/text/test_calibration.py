"""What splits have in common."""

import torch

from pipeline.text.calibration import count_shared


def test_windows_of_the_same_text_are_counted_however_they_are_cut():
    text = torch.randint(0, 5000, (2000,), generator=torch.Generator().manual_seed(0))
    known, other = text[:800].view(4, 200), text[1000:1600].view(3, 200)
    assert count_shared(other, known) == 0
    assert count_shared(text[70:670].view(3, 200), known) == 3
    assert count_shared(text[720:1320].view(3, 200), known) == 0  # 80 of the first window's 200
    assert count_shared(text[670:1270].view(3, 200), known) == 1  # 130 of them
