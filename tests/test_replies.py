"""Whole replies are what the schema says, and nothing in it is left out."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")

from plait.server.replies import ChatReply, CompletionReply, ResponsesReply
from test_server import QUESTION, ask, gold, serving


def test_replies_are_as_documented() -> None:
    asked: list[tuple[str, dict[str, Any], type[Any]]] = [
        ("/v1/chat/completions", ask(), ChatReply),
        ("/v1/chat/completions", ask(max_tokens=3, plait={"trace": True}), ChatReply),
        ("/v1/completions", {"prompt": QUESTION}, CompletionReply),
        ("/v1/completions", {"prompt": [QUESTION, QUESTION]}, CompletionReply),
        ("/v1/responses", {"input": QUESTION}, ResponsesReply),
    ]
    with serving(gold()) as server:
        paths = server.get("/openapi.json").json()["paths"]
        for path, body, model in asked:
            reply = server.post(path, body)
            assert reply.status_code == 200
            model.model_validate_json(reply.text, strict=True)
            whole = paths[path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
            assert whole == {"$ref": f"#/components/schemas/{model.__name__}"}


def test_a_request_without_a_body_gets_as_far_as_its_route() -> None:
    with serving(gold()) as server:
        assert server.http.post("/metrics").status_code == 405
        assert server.http.post("/v1/completions").status_code == 400
        assert server.http.post("/v1/completions", content=b"{}").status_code == 415
