"""What every run has around its work: errors, params of how to run, artifacts, progress, ranks, streams, memory,
and what stands behind the sources that params.yaml names.

Computes nothing of a result, so no stage depends on it in dvc.yaml: what changes an artifact's layout raises
`artifacts.FORMAT_VERSION`. Read `artifacts.py` first. Imports from no other room.
"""
