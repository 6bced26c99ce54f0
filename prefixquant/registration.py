"""Make transformers able to load exported folders, without importing it.

transformers keeps one class per quantization method. This project's classes import torch and transformers, which takes
seconds. So a placeholder is registered that imports them when transformers reads the config of an exported folder. If
transformers is not imported yet, that happens as soon as somebody imports its module `transformers.quantizers.auto`.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

METHOD = "prefixquant"  # as pipeline.inference.manifest.METHOD, which this module does not import
_REGISTRY = "transformers.quantizers.auto"


class ConfigPlaceholder:
    """Takes the place of `PrefixQuantConfig` in the registry of transformers until it is needed."""

    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        """Return the `PrefixQuantConfig` of a `quantization_config`. The import replaces this class in the registry."""
        from pipeline.inference.transformers_quantizer import PrefixQuantConfig

        return PrefixQuantConfig.from_dict(values, **options)


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds the module of the registry as Python would, and adds the placeholder once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                add_placeholder(module)

            setattr(spec.loader, "exec_module", run_and_add)  # noqa: B010 (a method of this one loader)
        return spec


def add_placeholder(registry: ModuleType) -> None:
    """Add the placeholder to the registry, unless the class itself is there."""
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, ConfigPlaceholder)


def register_with_transformers() -> None:
    """Register exported folders with transformers now, or as soon as it is imported."""
    if _REGISTRY in sys.modules:
        add_placeholder(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
