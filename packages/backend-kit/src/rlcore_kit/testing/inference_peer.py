"""Peers of inference servers on loopback, with a real tiny model: text-generation-inference, and OpenAI's protocol.

They implement what the servers document (paths, fields, errors, formats of streams), where the real servers cannot run:
text-generation-inference is no Python package. Endpoints below ``/peer`` are the peers' own, for tests.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rlcore_kit.testing.peer_model import Draw, Drawn, PeerModel

Answer = Mapping[str, Any] | list[Any] | Iterator[Mapping[str, Any]]
"""A JSON answer, or an iterator of server-sent events."""


class Refusal(Exception):
    """A request is answered with an HTTP status and a body."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body


class InferencePeer(ThreadingHTTPServer):
    """A server on a free port of loopback; requests run in threads.

    Args:
        model: model folder, or a model that peers share.
        api_key: expected as a bearer token, if given.
        token_s: seconds that each token takes at least.
        port: 0 chooses a free one.

    Attributes:
        asked: path and body of every POST request, in the order of their arrival.
        headers_seen: headers of the last request.
        faults: what happens to the next requests for a completion, one entry each: an HTTP status (int), "cut" closes
            the connection in the middle of the stream, "empty" ends it before the first token, "hang" sends nothing.
        retry_after_s: sent with status 429.
        restarted: folders that ``/peer/restart`` loaded, which plays the restart of a server.
    """

    daemon_threads = True
    request_queue_size = 512
    generate_paths: tuple[str, ...] = ()

    def __init__(
        self, model: Path | PeerModel, *, api_key: str | None = None, token_s: float = 0.0, port: int = 0
    ) -> None:
        self.model = model if isinstance(model, PeerModel) else PeerModel(model)
        self.api_key, self.token_s = api_key, token_s
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers_seen: dict[str, str] = {}
        self.faults: list[int | str] = []
        self.retry_after_s: float | None = None
        self.restarted: list[str] = []
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening; idempotent."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        """Return the answer to a request.

        Raises:
            Refusal: with its status.
        """
        if (method, path) == ("GET", "/health"):
            return {}
        if (method, path) == ("POST", "/peer/restart"):
            self.model.load(body["folder"])
            self.restarted.append(body["folder"])
            return {}
        raise Refusal(404, {"error": "Not Found"})

    def drawn(self, prompt: list[int], draw: Draw) -> Iterator[Drawn]:
        """Yield the sampled tokens, each after at least ``token_s`` seconds."""
        for token in self.model.stream(prompt, draw):
            if self.token_s:
                time.sleep(self.token_s)
            yield token


class TGIPeer(InferencePeer):
    """A peer of text-generation-inference, version 3."""

    generate_paths = ("/generate", "/generate_stream")
    max_concurrent_requests = 128

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        match method, path:
            case "GET", "/info":
                return {
                    "model_id": str(self.model.folder),
                    "model_sha": None,
                    "model_pipeline_tag": "text-generation",
                    "max_concurrent_requests": self.max_concurrent_requests,
                    "max_best_of": 2,
                    "max_stop_sequences": 4,
                    "max_input_tokens": self.model.config.max_position_embeddings - 1,
                    "max_total_tokens": self.model.config.max_position_embeddings,
                    "validation_workers": 2,
                    "max_client_batch_size": 4,
                    "router": "text-generation-router",
                    "version": "3.3.4",
                    "sha": None,
                    "docker_label": None,
                }
            case "POST", "/tokenize":
                ids = self._ids(body["inputs"])
                return [{"id": one, "text": self.model.tokenizer.decode([one]), "start": 0, "stop": 0} for one in ids]
            case "POST", "/generate":
                return self._generate(body)
            case "POST", "/generate_stream":
                return self._stream(body)
        return super().answer(method, path, body)

    def _ids(self, text: str) -> list[int]:
        return list(self.model.tokenizer(text).input_ids)

    def _draw(self, body: Mapping[str, Any]) -> tuple[list[int], Draw]:
        """Return prompt and parameters.

        Raises:
            Refusal: a value is not allowed, as the router's validation says it.
        """
        given = body.get("parameters") or {}
        ids, longest = self._ids(body["inputs"]), self.model.config.max_position_embeddings
        new = given.get("max_new_tokens", 100)
        problems = [
            (not body["inputs"], "`inputs` cannot be empty"),
            (given.get("temperature", 1.0) <= 0, "`temperature` must be strictly positive"),
            (not 0 < given.get("top_p", 0.5) < 1, "`top_p` must be > 0.0 and < 1.0"),
            (given.get("top_k", 1) <= 0, "`top_k` must be strictly positive"),
            (
                len(ids) + new > longest,
                f"`inputs` tokens + `max_new_tokens` must be <= {longest}. Given: {len(ids)} `inputs` tokens and {new} "
                "`max_new_tokens`",
            ),
        ]
        for wrong, message in problems:
            if wrong:
                raise Refusal(422, {"error": f"Input validation error: {message}", "error_type": "validation"})
        filters = {name: given[name] for name in ("top_k", "top_p") if name in given}
        sampled = given.get("do_sample", False) or filters or given.get("temperature", 1.0) != 1
        temperature = given.get("temperature", 1.0) if sampled else 0.0
        return ids, Draw(new, temperature, **filters, seed=_seed(given))

    def _tokens(self, ids: list[int], draw: Draw) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Yield tokens as the server shows them, with the reason at the last one."""
        ends = self.model.config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        for count, drawn in enumerate(self.drawn(ids, draw), start=1):
            end = drawn.token in ends
            token = {
                "id": drawn.token,
                "text": self.model.tokenizer.decode([drawn.token]),
                "logprob": drawn.logprob("filtered"),
                "special": end,
            }
            reason = "length" if count == draw.max_tokens else "eos_token" if end else None
            yield token, reason
            if reason:
                return

    def _generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        ids, draw = self._draw(body)
        found = list(self._tokens(ids, draw))
        text = self.model.tokenizer.decode([token["id"] for token, _ in found], skip_special_tokens=True)
        prefill = [{"id": one, "text": self.model.tokenizer.decode([one]), "logprob": None} for one in ids]
        details = {
            "finish_reason": found[-1][1],
            "generated_tokens": len(found),
            "seed": draw.seed,
            "prefill": prefill if body["parameters"].get("decoder_input_details") else [],
            "tokens": [token for token, _ in found],
        }
        return {"generated_text": text, **({"details": details} if body["parameters"].get("details") else {})}

    def _stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            if (body.get("parameters") or {}).get("decoder_input_details"):
                message = "`decoder_input_details` == true is not supported when streaming tokens"
                raise Refusal(422, {"error": f"Input validation error: {message}", "error_type": "validation"})
            ids, draw = self._draw(body)
        except Refusal as refusal:  # within the stream, with status 200
            yield dict(refusal.body)
            return
        tokens: list[int] = []
        for index, (token, reason) in enumerate(self._tokens(ids, draw), start=1):
            tokens.append(token["id"])
            event = {"index": index, "token": token, "top_tokens": [], "generated_text": None, "details": None}
            if reason:
                event["generated_text"] = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
                event["details"] = {
                    "finish_reason": reason,
                    "generated_tokens": index,
                    "seed": draw.seed,
                    "input_length": len(ids),
                }
            yield event


class OpenAIPeer(InferencePeer):
    """A peer of vLLM's and SGLang's ``/v1/completions``, of their endpoints that load weights, and of vLLM's scores.

    Attributes:
        name: of the model.
        logprobs: what the server's log-probs are: "scaled" by the temperature (SGLang), "raw" (vLLM's default),
            "filtered" (vLLM with processed_logprobs).
        ids: how it shows the ids of tokens: in token_ids, in the names of tokens (older vLLM), or not.
        ignored: fields of requests that it ignores.
        device: on which it says that it computes.
        defaults: fields for requests that do not have them, as of the model's generation settings.
        hides_ends: it leaves out the token that ends a completion.
        max_logprobs: number of candidates that it gives at a prompt's tokens.
        score_shift: added to the scores, which then are no log-probs.
    """

    generate_paths = ("/v1/completions",)
    name = "peer"
    logprobs: Literal["scaled", "raw", "filtered"] = "scaled"
    ids: Literal["token_ids", "names", "none"] = "token_ids"
    ignored: frozenset[str] = frozenset()
    device = "cuda"
    defaults: Mapping[str, Any] = MappingProxyType({})
    hides_ends = False
    max_logprobs = 20
    score_shift = 0.0

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        match method, path:
            case "GET", "/v1/models":
                longest = self.model.config.max_position_embeddings
                card = {"id": self.name, "object": "model", "root": str(self.model.folder), "max_model_len": longest}
                return {"object": "list", "data": [card]}
            case "POST", "/v1/completions":
                return self._complete(body) if body.get("prompt_logprobs") is None else self._score(body)
            case "GET", "/version":
                return {"version": "0.32.0"}
            case "POST", "/detokenize":
                return {"prompt": self.model.tokenizer.decode(body["tokens"])}
            case "GET", "/server_info?config_format=json":  # vLLM
                return {"vllm_config": {"device_config": {"device": self.device}}}
            case "POST", "/update_weights_from_disk":  # SGLang
                self.model.load(body["model_path"])
                return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
            case "POST", _ if path.startswith("/flush_cache?timeout="):  # SGLang
                return {}
            case "POST", "/collective_rpc" if body["method"] == "reload_weights":  # vLLM
                self.model.load(body["kwargs"]["weights_path"])
                return {"results": [None]}
            case "POST", "/reset_prefix_cache":
                return {}
        return super().answer(method, path, body)

    def _complete(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        body = {**self.defaults, **{name: value for name, value in body.items() if name not in self.ignored}}
        prompt, longest = list(body["prompt"]), self.model.config.max_position_embeddings
        if body["model"] != self.name:
            raise Refusal(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if len(prompt) + body["max_tokens"] > longest:
            raise Refusal(400, {"error": {"message": f"This model's maximum context length is {longest} tokens."}})
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p")
        draw = Draw(**{name: body[name] for name in names if name in body}, seed=_seed(body))
        draw = replace(draw, top_k=max(draw.top_k, 0))
        return self._events(body, prompt, draw)

    def _score(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of vLLM to a request for the log-probs of its prompt."""
        prompt, count = list(body["prompt"]), body["prompt_logprobs"]
        if count > self.max_logprobs:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.max_logprobs}"
            raise Refusal(400, {"error": {"message": message}})
        rows: list[dict[str, Any] | None] = [None]
        # shift allowed: as the server does it
        for token, logprobs in zip(prompt[1:], self.model.logprobs(prompt)):
            best = {int(other) for other in logprobs.topk(count).indices}
            ranked = sorted({token, *best}, key=lambda other: other != token)  # the given token first, as vLLM does
            rows.append({str(other): {"logprob": float(logprobs[other]) + self.score_shift} for other in ranked})
        return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": rows}]}

    def _events(self, body: Mapping[str, Any], prompt: list[int], draw: Draw) -> Iterator[dict[str, Any]]:
        ends = set(body.get("stop_token_ids") or ())
        if not body.get("ignore_eos"):
            ends.add(self.model.config.eos_token_id)
        for count, drawn in enumerate(self.drawn(prompt, draw), start=1):
            text = self.model.tokenizer.decode([drawn.token])
            choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
            if body.get("logprobs") is not None:
                choice["logprobs"] = self._logprobs(drawn, body["logprobs"])
            if self.ids == "token_ids" and body.get("return_token_ids"):
                choice["token_ids"] = [drawn.token]
                if count == 1:
                    choice["prompt_token_ids"] = prompt
            ended = drawn.token in ends
            if ended or count == draw.max_tokens:
                choice["finish_reason"] = "stop" if ended else "length"
            if ended and self.hides_ends:
                choice |= {"text": "", "token_ids": [], "logprobs": None}
            yield {"id": "cmpl-0", "object": "text_completion", "model": self.name, "choices": [choice]}
            if ended:
                return

    def _logprobs(self, drawn: Drawn, count: int) -> dict[str, Any]:
        logits = getattr(drawn, self.logprobs).log_softmax(-1)
        values, tokens = logits.topk(count)
        best = [(int(token), max(float(value), -9999.0)) for token, value in zip(tokens, values)]
        logprob = drawn.logprob(self.logprobs)
        name = "token_id:{}".format if self.ids == "names" else lambda token: self.model.tokenizer.decode([token])
        return {
            "tokens": [name(drawn.token)],
            "token_logprobs": [logprob],
            "top_logprobs": [{name(token): value for token, value in best}],
            "text_offset": [0],
        }


def _seed(parameters: Mapping[str, Any]) -> int:
    seed = parameters.get("seed")
    return time.time_ns() % 2**32 if seed is None else int(seed)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: InferencePeer

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._route("GET", {})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        content = self.rfile.read(length)
        if len(content) < length:  # the client is gone
            self.close_connection = True
            return
        body = json.loads(content) if content else {}
        self.server.asked.append((self.path, body))
        self._route("POST", body)

    def _route(self, method: str, body: dict[str, Any]) -> None:
        peer = self.server
        peer.headers_seen = {name.lower(): value for name, value in self.headers.items()}
        try:
            if peer.api_key is not None and self.headers.get("authorization") != f"Bearer {peer.api_key}":
                raise Refusal(401, {"error": "Unauthorized"})
            fault = peer.faults.pop(0) if self.path in peer.generate_paths and peer.faults else ""
            if isinstance(fault, int):
                raise Refusal(fault, {"error": f"status {fault} was asked for", "error_type": "overloaded"})
            if fault == "hang":
                time.sleep(60)
            answer = peer.answer(method, self.path, body)
        except Refusal as refusal:
            self._send(refusal.body, refusal.status)
            return
        except Exception as error:
            self._send({"error": repr(error)}, 500)
            return
        with suppress(OSError):  # the client is gone, and with it the request
            if isinstance(answer, Mapping | list):
                self._send(answer, 200)
            else:
                self._send_events(answer, str(fault))

    def _send(self, body: Any, status: int) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        if status == 429 and self.server.retry_after_s is not None:
            self.send_header("retry-after", str(self.server.retry_after_s))
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_events(self, events: Iterator[Mapping[str, Any]], fault: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number, event in enumerate(events):
            if fault == "empty":
                break
            if fault == "cut" and number == 2:
                self.close_connection = True
                return
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())
        if self.server.generate_paths == ("/v1/completions",):
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
