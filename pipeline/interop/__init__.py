"""The model in formats of other programs: compressed-tensors, GGUF, ONNX, a PEFT adapter.

Read `other_formats.py` first: it says how much each format can hold and which models are refused, and it calls the
writers `compressed_tensors.py`, `gguf_writer.py` and `onnx_folder.py`. The ONNX format has four more modules: the graph
(`onnx_graph.py`), the names of files and inputs (`onnx_layout.py`), the folder in ONNX Runtime (`onnx_session.py`) and
the command `onnx-generate` (`onnx_command.py`). `compressed_tensors.py` is tested in test_other_formats.py and
test_number_formats.py, `onnx_layout.py` in test_onnx_session.py. May import from: runtime to export.
"""
