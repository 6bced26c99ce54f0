"""Memory and disk that a stage will need, computed from the model's shapes before it runs (`--plan`).

Read `need.py` first, then the module of a stage. `constants.py` lists every fitted constant. Plans compute no result,
so a changed plan reruns no stage. All modules are tested in tests/planning/test_plans.py, and the bytes of files in
test_disk.py. May import from: runtime to evaluation.
"""
