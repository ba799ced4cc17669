"""tokenmix: a declarative architecture language and compiler for token-mixer vision backbones.

`load` reads a spec and counts it, without torch; `build` compiles it to a torch module.

    >>> import tokenmix
    >>> tokenmix.load("mixformer_b4").cost().params
    34797572
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Cost", "Finding", "FindingsError", "Model", "build", "for_inference", "keep_memory", "load", "load_weights"]

if TYPE_CHECKING:
    from tokenmix.compiler.model import Cost, Model, load
    from tokenmix.dsl.diagnostics import Finding, FindingsError
    from tokenmix.runtime.inference import for_inference
    from tokenmix.runtime.memory import keep_memory
    from tokenmix.runtime.module import build
    from tokenmix.runtime.weights import load_weights

_HOMES = {
    "Cost": "tokenmix.compiler.model",
    "Finding": "tokenmix.dsl.diagnostics",
    "FindingsError": "tokenmix.dsl.diagnostics",
    "Model": "tokenmix.compiler.model",
    "build": "tokenmix.runtime.module",
    "for_inference": "tokenmix.runtime.inference",
    "keep_memory": "tokenmix.runtime.memory",
    "load": "tokenmix.compiler.model",
    "load_weights": "tokenmix.runtime.weights",
}


def __getattr__(name: str) -> Any:
    # Names are imported when first used: `import tokenmix` costs nothing, and torch comes in with `build` alone.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tokenmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
