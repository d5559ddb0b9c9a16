"""The whole system of the Qwen2 Technical Report (arXiv 2407.10671) as one package.

One legend of dimensions holds everywhere: N tokens (flat), B batch, T time, H query heads, K kv
heads, D head_dim, C model width, I intermediate, E experts, V vocabulary.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2.inference import Engine, SamplingParams
    from qwen2.model.hub import load

# Two OpenMP threads that spin beside another busy process run up to 15 times slower; waiting
# passively mends it, but only when it is set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"

__all__ = ["Engine", "SamplingParams", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap: torch comes with the first use.
    if name == "load":
        from qwen2.model.hub import load

        return load
    if name in ("Engine", "SamplingParams"):
        from qwen2 import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
