from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest

class InputProcessor:
    vllm_config: VllmConfig

    def process_inputs(self, *args: Any, **kwargs: Any) -> EngineCoreRequest: ...
