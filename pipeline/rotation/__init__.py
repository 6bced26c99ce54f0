"""The rotations R1 to R5 (QuaRot): make them (`matrices.py`), merge them (`merging.py`), check the result (`gate.py`).

Read `merging.py` first, which the stage `rotation` calls. `params.py` is tested in tests/test_params.py. May import
from: runtime to inspection.
"""
