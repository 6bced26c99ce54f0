"""Checks and measurements of a whole model that walk over its blocks.

`import_gate.py` compares an imported model with transformers' own reading (stage `model`), `start_decision.py` decides
whether texts get a start token (stage `calibration`), `saturation.py` counts values beyond static ranges, `routing.py`
compares the experts that two models choose. May import from: runtime to blocks.
"""
