"""`qwen2 upcycle`: make a mixture of experts from a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import Dtype, Json


def upcycle(
    dense: Annotated[
        str, typer.Argument(help="A dense model: a folder, a .gguf file, a hub name.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    experts: Annotated[int, typer.Option(help="Routed experts of a layer.")] = 64,
    experts_per_token: Annotated[int, typer.Option(help="Experts that a token is sent to.")] = 8,
    expert_size: Annotated[
        int | None,
        typer.Option(help="Width of an expert; when not given, 2560/18944 of the dense FFN's."),
    ] = None,
    shared_size: Annotated[
        int | None,
        typer.Option(
            help="Width of the shared experts; when not given, that of a token's experts."
        ),
    ] = None,
    init: Annotated[
        str, typer.Option(help="report, or copy: neither shuffled nor initialised anew.")
    ] = "report",
    reinit: Annotated[float, typer.Option(help="Share of each expert that starts anew.")] = 0.5,
    granularity: Annotated[
        str, typer.Option(help="Start anew by intermediate unit, or by single parameter.")
    ] = "unit",
    std: Annotated[
        str, typer.Option(help="Of new numbers: matched to the dense ones, or initializer_range.")
    ] = "matched",
    router_std: Annotated[
        float | None, typer.Option(help="Of the router; initializer_range when not given.")
    ] = None,
    shared: Annotated[
        str, typer.Option(help="Shared experts: preserve (the dense FFN exactly), copy or random.")
    ] = "preserve",
    seed: Annotated[int, typer.Option(help="Draws the same again.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write OUT, a mixture of experts that starts from the weights of DENSE."""
    import json

    from qwen2.model import upcycle as upcycling

    options = upcycling.UpcycleConfig.parse(
        {
            "experts": experts,
            "experts_per_token": experts_per_token,
            "expert_size": expert_size,
            "shared_size": shared_size,
            "init": init,
            "reinit": reinit,
            "granularity": granularity,
            "std": std,
            "router_std": router_std,
            "shared": shared,
            "seed": seed,
        },
        "upcycle",
    )
    config = upcycling.upcycle(dense, out, options, dtype=dtype)
    assert config.moe is not None
    copies, discarded = upcycling.count_copies(config.moe, config.intermediate_size)
    result = {
        "path": str(out),
        "parameters": config.num_parameters(),
        "active_parameters": config.num_active_parameters(),
        "expert_size": config.moe.moe_intermediate_size,
        "shared_size": config.moe.shared_expert_intermediate_size,
        "copies": copies,
        "discarded": discarded,
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(
            f"{out}: {result['parameters']:,} parameters, {result['active_parameters']:,} active; "
            f"{experts} experts of {config.moe.moe_intermediate_size} from {copies} copies"
        )
