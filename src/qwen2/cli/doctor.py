"""`qwen2 doctor`: what this machine has, and which kernels it will use."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qwen2.cli.options import Json, Threads

OPTIONAL = {  # what for: the modules that it needs
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"),
    "grammars": ("llguidance",),
}


def doctor(
    again: Annotated[bool, typer.Option("--measure", help="Measure the kernels again.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show the machine, versions, optional parts, and the kernels that were measured fastest."""
    import json

    from qwen2.common.runtime import set_threads
    from qwen2.model import kernels

    set_threads(threads)
    kernels.tune(again)
    found = {**_machine(), "optional": _optional(), "kernels": _kernels()}
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)


def _machine() -> dict[str, Any]:
    import platform

    import torch

    import qwen2
    from qwen2.common.hardware import hardware
    from qwen2.common.runtime import free_memory, pick_device

    device = pick_device()
    return {
        "qwen2": qwen2.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "free memory": f"{free_memory(device) / 2**30:.1f} GiB",
        "bf16 on the CPU": "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated",
    }


def _optional() -> dict[str, str]:
    from importlib.util import find_spec

    from qwen2.model import native

    parts = {}
    for part, modules in OPTIONAL.items():
        missing = [name for name in modules if find_spec(name) is None]
        hint = f"missing: {', '.join(missing)}; pip install 'qwen2[serve]'"
        parts[part] = hint if missing else "installed"
    reason = native.why_not()
    slow = "compiled, without AVX-512 (VNNI and BF16): the plain loops"
    parts["native kernels"] = reason or ("with AVX-512" if native.is_fast() else slow)
    return parts


def _kernels() -> list[dict[str, Any]]:
    from qwen2.model import kernels

    return [
        {
            "operation": name,
            "about": operation.about,
            "chosen": operation.chosen,
            "microseconds": operation.microseconds,
        }
        for name, operation in kernels.TABLE.items()
    ]


def _show(found: dict[str, Any]) -> None:
    table = found.pop("kernels")
    optional = found.pop("optional")
    for name, value in [*found.items(), *optional.items()]:
        print(f"{name:16} {value}")
    print("\nkernels, in microseconds on operands of the 0.5B's widths (* is used)")
    for row in table:
        print(f"  {row['about']}")
        for name, time in sorted(row["microseconds"].items(), key=lambda pair: pair[1]):
            print(f"   {'*' if name == row['chosen'] else ' '}{time:10,.0f}  {name}")
