"""The loop of a child process that measures: one JSON object a line, asked and answered.

It needs nothing but Python, for it runs in the environment of each peer. Between two calls it waits
for a line, and so leaves the cores to others. `{"do": "decode", ...}` is answered by
`{"result": ...}` or `{"error": "..."}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer(load: Callable[..., Mapping[str, Callable[..., Any]]]) -> None:
    """Call `load` with the arguments of the command line, then what it returns by name."""
    # What libraries print is not an answer.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(work: Callable[[], Any]) -> Any:
        result = None
        try:
            line = {"result": (result := work())}
        except Exception as error:
            line = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(line, default=lambda _: "loaded"), file=out, flush=True)
        return result

    calls = reply(lambda: load(*sys.argv[1:]))
    if calls is None:
        sys.exit(1)
    for line in sys.stdin:
        arguments = json.loads(line)
        call = calls[arguments.pop("do")]
        reply(lambda call=call, arguments=arguments: call(**arguments))
