"""Hugging Face's text-generation-inference (TGI).

Written from the sources of its version 3. Its habits:

- Prompts are text, and the server tokenises them, with special tokens. A prompt of ids is sent as its text only if this
  process's tokenizer and the server's (``/tokenize``) both make the same ids of it.
- Temperature 0 and top-p 1 are refused; they are left out. There is no min-p and no way to ignore end tokens.
- Log-probs are those of softmax(logits / temperature) after top-k and top-p.
- A refused or failed stream has status 200 and an event with an error.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from rlcore.engines.rollout import GenerationRequest, SamplingParams
from rlcore.errors import EngineError, WorkerError
from rlcore_http.protocol import SEEDS, Abilities, Piece, ServerProtocol, difference
from rlcore_kit.serving.connection import Connection, Overloaded
from rlcore_kit.serving.handshake import check_length, check_same_model
from rlcore_kit.serving.wire_format import in_format

ABILITIES = Abilities(scaled_logprobs=True, logprobs_before_filters=False, min_p=False)
MAX_PROMPTS = 4096
"""Prompts whose text is remembered."""


class TGI(ServerProtocol):
    """`ServerProtocol` of text-generation-inference.

    Args:
        tokenizer: of the policy's model.
    """

    path = "/generate_stream"

    def __init__(self, connection: Connection, request_fields: Mapping[str, Any], tokenizer: Any) -> None:
        super().__init__(connection, request_fields)
        self._tokenizer = tokenizer
        self._texts: OrderedDict[tuple[int, ...], asyncio.Task[str]] = OrderedDict()

    def shake_hands(self, model: str | None, folder: str, max_model_len: int) -> None:
        """Compare the server's model and limits with what the run needs."""
        url, info = self.connection.url, self.connection.ask("GET", "/info", "report its model")
        try:
            served, longest = str(info["model_id"]), int(info["max_total_tokens"])
            self.max_concurrent = int(info["max_concurrent_requests"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{url} does not answer as text-generation-inference: {error!r}") from error
        if model is not None and model != served:
            raise EngineError(f"{url} serves {served}, not {model} (rollout.http.model)")
        check_length(url, longest, max_model_len, f"--max-total-tokens {max_model_len}")
        check_same_model(url, served, folder)

    async def check_tokenizer(self, prompt: list[int]) -> None:
        """Compare the ids that the model gets with ``prompt``: its own tokenizer may differ from that of the endpoint.

        Raises:
            EngineError: they differ.
        """
        text = await self._text(GenerationRequest(prompt, SamplingParams(max_tokens=1), request_id="probe"))
        body = {"inputs": text, "parameters": {"max_new_tokens": 1, "details": True, "decoder_input_details": True}}
        limit = self.connection.timeout_s
        answer = await self.connection.request(
            "POST", "/generate", "complete a first request", body=body, timeout_s=limit
        )
        with in_format(self.connection.url, "/generate"):
            found = [int(token["id"]) for token in answer["details"]["prefill"]]
        if found != prompt:
            raise EngineError(
                f"{self.connection.url} gives its model other tokens than {prompt} for the text {text!r}: "
                f"{difference(found, prompt)}; does it serve another model or tokenizer?"
            )

    async def body(self, request: GenerationRequest, max_tokens: int, ends: frozenset[int], best: int) -> Any:
        """Return the body of ``request``, whose prompt the server must read as the same ids."""
        wanted = request.sampling
        parameters: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "details": True,
            "do_sample": wanted.temperature > 0,
        }
        if wanted.temperature not in (0.0, 1.0):
            parameters["temperature"] = wanted.temperature
        if wanted.top_k:
            parameters["top_k"] = wanted.top_k
        if wanted.top_p < 1:
            parameters["top_p"] = wanted.top_p
        if wanted.seed is not None:
            parameters["seed"] = wanted.seed % SEEDS
        return {"inputs": await self._text(request), "parameters": {**parameters, **self.request_fields}}

    def read(self, event: Any, request: GenerationRequest) -> Piece:
        """Return the token in one event."""
        if "error" in event:
            self._raise(event, request)
        token, details = event["token"], event.get("details") or {}
        logprobs = [float(token["logprob"])] if request.sampling.logprobs else []
        return Piece([int(token["id"])], logprobs, details.get("finish_reason"))

    def _raise(self, event: Mapping[str, Any], request: GenerationRequest) -> None:
        url, kind, message = self.connection.url, event.get("error_type"), event["error"]
        if kind == "overloaded":
            raise Overloaded(f"{url} has too many requests to complete request {request.request_id!r} ({message})")
        if kind == "validation":
            raise EngineError(f"{url} refuses to complete request {request.request_id!r}: {message}")
        raise WorkerError(f"{url} failed to complete request {request.request_id!r}: {message}")

    async def _text(self, request: GenerationRequest) -> str:
        """Return the text that the server reads as the prompt of ``request``; requests of a group share one check."""
        prompt = tuple(request.prompt)
        task = self._texts.get(prompt)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._texts[prompt] = asyncio.ensure_future(self._checked_text(request))
            if len(self._texts) > MAX_PROMPTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return await asyncio.shield(task)

    async def _checked_text(self, request: GenerationRequest) -> str:
        prompt = list(request.prompt)
        text = self._text_of(prompt, f"the prompt of request {request.request_id!r}")
        what, limit = "tokenise a prompt", self.connection.timeout_s
        answer = await self.connection.request("POST", "/tokenize", what, body={"inputs": text}, timeout_s=limit)
        with in_format(self.connection.url, "/tokenize"):
            found = [int(token["id"]) for token in answer]
        if found != prompt:
            raise EngineError(
                f"{self.connection.url} reads the prompt of request {request.request_id!r} as other tokens: "
                f"{difference(found, prompt)}; does it serve another model or tokenizer?"
            )
        return text

    def _text_of(self, prompt: list[int], name: str) -> str:
        """Return a text of which the tokenizer makes ``prompt``, the special tokens that it adds included."""
        added = self._tokenizer("").input_ids
        start = len(added) if added and prompt[: len(added)] == added else 0
        text: str = self._tokenizer.decode(
            prompt[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found = list(self._tokenizer(text).input_ids)
        if found != prompt:
            raise EngineError(
                f"{name} has no text of which the tokenizer makes it ({difference(found, prompt)}), and "
                "text-generation-inference takes prompts as text only: use a server with prompts as token ids"
            )
        return text
