class ForwardContext:
    no_compile_layers: dict[str, object]

def get_forward_context() -> ForwardContext: ...
