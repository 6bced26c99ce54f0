"""R1 to R5 (QuaRot): made (`matrices.py`), merged into the weights (`merging.py`), and checked (`gate.py`).

Read `merging.py` first: it is what the stage `rotation` calls. May import from: runtime to blocks.
"""
