"""`/tokenize`, `/detokenize`, `/tokenizer_info`: a model's tokens, by the names that vLLM gave these routes.

Evaluations ask for them to know where a text's context ends. They compute nothing and open no way in: text becomes a
control token nowhere but here, where a prompt is the name of one and nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from plait.errors import RequestError
from plait.server.refusal import Refusal
from plait.server.reply import asked
from plait.server.schemas import DetokenizeRequest, TokenizeRequest
from plait.server.service import Asked
from plait.tokenizer.text import TextTokenizer

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, asked: Annotated[Asked, Depends(asked)]) -> dict[str, Any]:
    """Ids of a text."""
    model = asked.service.find(body.model).model
    control = model.tokenizer.control_id(body.prompt)
    try:
        ids = model.tokenizer.encode(body.prompt) if control is None else [control]
    except RequestError as exc:
        raise Refusal(str(exc), code="unknown_text", param="prompt") from exc
    if body.add_special_tokens:
        ids = [*model.tokenizer.bos_ids, *ids]
    return {"count": len(ids), "max_model_len": model.max_context, "tokens": ids}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, asked: Annotated[Asked, Depends(asked)]) -> dict[str, str]:
    """The text of ids."""
    tokenizer = asked.service.find(body.model).model.tokenizer
    bad = [id for id in body.tokens if id >= len(tokenizer.tokens)]
    if bad:
        raise Refusal(f"token id {bad[0]} is not in the vocabulary of {len(tokenizer.tokens)}", param="tokens")
    return {"prompt": tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(asked: Annotated[Asked, Depends(asked)], model: str | None = None) -> dict[str, Any]:
    """Its special tokens, and the chat template of a model that has one; prompts of others Plait writes itself."""
    served = asked.service.find(model).model
    tokenizer = served.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer.tokens),
        "bos_token": tokenizer.decode(tokenizer.bos_ids),
        "eos_token": tokenizer.decode(tokenizer.eos_ids[:1]),
        "chat_template": tokenizer.template if isinstance(tokenizer, TextTokenizer) and served.plain else None,
    }
