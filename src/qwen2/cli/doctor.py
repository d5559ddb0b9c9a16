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

    import torch

    from qwen2.common.runtime import set_threads
    from qwen2.model import kernels

    set_threads(threads)
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in here:
        kernels.tune(torch.device(device), again)
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
    """The table; of a device that is not here without times, in the order of what is tried."""
    from qwen2.model import kernels
    from qwen2.model.operation import DEVICES

    return [
        {
            "operation": name,
            "device": device,
            "about": operation.about,
            "chosen": operation.order[device][0],
            "kernels": list(operation.kernels[device]),
            "microseconds": operation.microseconds.get(device, {}),
            "not used": {n: k.never for n, k in operation.kernels[device].items() if k.never},
        }
        for device in DEVICES
        for name, operation in kernels.TABLE.items()
    ]


def _show(found: dict[str, Any]) -> None:
    table = found.pop("kernels")
    optional = found.pop("optional")
    for name, value in [*found.items(), *optional.items()]:
        print(f"{name:16} {value}")
    measured = [row for row in table if row["microseconds"]]
    for device in dict.fromkeys(row["device"] for row in measured):
        print(f"\nkernels on {device}, in microseconds with the 0.5B's widths (* is used)")
        for row in measured:
            if row["device"] == device:
                _show_times(row)
    others = [row for row in table if not row["microseconds"]]
    for device in dict.fromkeys(row["device"] for row in others):
        print(f"\nkernels on {device}, which is not here; what is tried, in this order")
        for row in others:
            if row["device"] == device:
                print(f"  {row['about']}: {', then '.join(row['kernels'])}")


def _show_times(row: dict[str, Any]) -> None:
    print(f"  {row['about']}")
    times = row["microseconds"]
    for name in sorted(times, key=lambda name: times[name] or float("inf")):
        mark = "*" if name == row["chosen"] else " "
        time = f"{times[name]:10,.0f}" if times[name] else f"{'cannot':>10}"
        note = f" ({row['not used'][name]})" if name in row["not used"] else ""
        print(f"   {mark}{time}  {name}{note}")
