"""`POST /v1/embeddings`: the final hidden state of a text's last token, brought to length 1.

The models here are language models: their hidden states tell texts apart, though not as well as
those of a model that was trained for it.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from fastapi import APIRouter, Request
from starlette.responses import Response

from qwen2.inference import SamplingParams
from qwen2.serve import flight as flights
from qwen2.serve.errors import ApiError, Json
from qwen2.serve.flight import Flight, Job
from qwen2.serve.protocol import EmbeddingRequest
from qwen2.serve.service import Service
from qwen2.serve.stream import whole


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()
    width = service.engine.engine.model.config.hidden_size

    @routes.post("/v1/embeddings")
    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        """Turn texts into vectors."""
        model = service.check_model(body.model)
        if body.dimensions is not None and body.dimensions > width:
            raise ApiError(400, f"this model has {width} dimensions", param="dimensions")

        async def answer() -> Response:
            caller = request.state.caller
            return await _answer(
                body, model, await service.launch(lambda: _jobs(service, body), caller)
            )

        return await whole(request, answer())

    return routes


def _jobs(service: Service, body: EmbeddingRequest) -> list[Job]:
    if not body.input or (isinstance(body.input, list) and "" in body.input):
        raise ApiError(400, "a text is empty", param="input")
    jobs = []
    for prompt in service.encode_prompts(body.input):
        service.check_length(len(prompt), 0, "input")
        jobs.append(Job(prompt, SamplingParams(max_tokens=1), embed=True))
    return jobs


async def _answer(body: EmbeddingRequest, model: str, flight: Flight) -> Response:
    try:
        async for _, output in flight:
            if error := flights.failure(output):
                raise error
    finally:
        flight.cancel()
    tokens = sum(len(request.prompt) for request in flight.requests)
    data = []
    for index, request in enumerate(flight.requests):
        assert request.embedding is not None
        vector = normalised(request.embedding, body.dimensions)
        shown: Any = vector.tolist()
        if body.encoding_format == "base64":
            shown = base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    return Json(
        {
            "object": "list",
            "data": data,
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def normalised(vector: torch.Tensor, dimensions: int | None) -> torch.Tensor:
    """The first `dimensions` (all, when None) of a vector (C,), of L2 norm 1."""
    return torch.nn.functional.normalize(vector[:dimensions].float(), dim=0)
