"""`POST /tokenize` and `/detokenize`, in the shapes that vLLM gave them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from qwen2.serve.errors import ApiError, Json
from qwen2.serve.logprobs import token_bytes, token_name
from qwen2.serve.protocol import DetokenizeRequest, TokenizeRequest
from qwen2.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    tokenizer = service.tokenizer

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the model is given it."""
        service.check_model(body.model)

        def encode() -> dict[str, Any]:
            if body.messages is not None:
                ids = service.encode_chat(body.messages, body.tools, body.add_generation_prompt)
            else:
                ids = tokenizer.encode(body.prompt or "", parse_special=body.add_special_tokens)
            shown: dict[str, Any] = {
                "tokens": ids,
                "count": len(ids),
                "max_model_len": service.context,
            }
            if body.return_token_strs:
                shown["token_strs"] = [token_name(token_bytes(tokenizer, id_)) for id_ in ids]
            return shown

        return Json(await service.prepare(encode))

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        known = service.engine.engine.vocabulary
        if wrong := [id_ for id_ in body.tokens if id_ >= known]:
            raise ApiError(400, f"{wrong[0]} is no token id; ids are 0 to {known - 1}")
        return Json({"prompt": await service.prepare(lambda: tokenizer.decode(body.tokens))})

    return routes
