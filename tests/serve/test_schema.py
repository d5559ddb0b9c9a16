"""schemathesis on our own /openapi.json: whatever it makes of the schema, the server stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")

ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"), ("POST", "/v1/responses/input_tokens"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
    ("GET", "/health"), ("GET", "/metrics"),
]  # fmt: skip


@pytest.fixture(scope="module")
def small(serve: Any) -> Iterator[Any]:
    """A server whose answers are short."""
    with serve(max_position_embeddings=64, num_hidden_layers=1) as served:
        yield served


def test_all_routes_are_described(small: Any) -> None:
    paths = small.client.get("/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert described == set(ROUTES)
    for methods in paths.values():
        for operation in methods.values():
            assert {"200", "400", "401"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_is_a_5xx(small: Any, method: str, path: str, mode: str) -> None:
    """With bodies as the schema has them, and with others."""
    schema = schemathesis.openapi.from_dict(small.client.get("/openapi.json").json())
    operation = schema[path][method]
    if mode == "NEGATIVE" and method == "GET":
        pytest.skip("nothing can be wrong with it")
    cases = operation.as_strategy(generation_mode=getattr(schemathesis.GenerationMode, mode))

    @settings(
        max_examples=50,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: Any) -> None:
        response = case.call(base_url=small.url, timeout=30)
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()
