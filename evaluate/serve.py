"""A model behind an OpenAI-like address: `python -m evaluate.serve CONFIG --checkpoint DIR`.

`POST /v1/chat/completions` with a question and an image as a data URL, as lmms-eval and
VLMEvalKit send them to any such address; `GET /v1/models`. Requests are answered one after the
other, and images are never fetched from elsewhere.
"""

import argparse
import base64
import functools
import http.server
import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from evaluate import hub
from evaluate.ask import asker, asking, decoded
from evaluate.run import restored, trained
from jaxformer.errors import InputError
from jaxformer.experiment import load
from jaxformer.program import entry

Answer = Callable[[bytes, str], str]  # (encoded image, question) -> text.
MOST = 32 * 2**20  # bytes of a request.


def asked(body: bytes) -> tuple[bytes, str]:
    """The image, still encoded, and the question of a request: those of its last user.

    Raises:
      InputError: it is no request for a chat, or asks for what a model here cannot do.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON ({error}); send a chat completion") from None
    messages = request.get("messages") if isinstance(request, dict) else None
    if not isinstance(messages, list):
        raise InputError('the request has no "messages", a list; send a chat completion')
    if request.get("stream") or request.get("n", 1) != 1:
        raise InputError("stream and n are not known here; ask for one answer, whole")
    said = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    content = said[-1].get("content") if said else None
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise InputError('no message of "user" has a content; ask something')
    texts = [str(part.get("text", "")) for part in parts if part.get("type") == "text"]
    images = [part.get("image_url") for part in parts if part.get("type") == "image_url"]
    question = " ".join(texts).strip()
    if not question:
        raise InputError("the question is empty; ask something")
    if len(images) != 1:
        raise InputError(f"the question has {len(images)} images; send it with one")
    url = images[0].get("url") if isinstance(images[0], dict) else images[0]
    head, comma, data = str(url).partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise InputError("an image is a data URL, data:image/png;base64,...; none is fetched")
    try:
        return base64.b64decode(data, validate=True), question
    except ValueError as error:
        raise InputError(f"the image's data is not base64 ({error}); encode it so") from None


def completion(model: str, text: str) -> dict[str, Any]:
    """A chat completion with one answer."""
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{time.time_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by `answer`, under the name `model`."""

    timeout = 60  # seconds that a client may be silent.

    def __init__(self, *args: Any, answer: Answer, model: str):
        self.answer, self.model = answer, model
        super().__init__(*args)

    def do_GET(self) -> None:
        """Which model there is."""
        if self.path.rstrip("/") != "/v1/models":
            return self._refuse(404, f"{self.path}: there is none; ask for /v1/models")
        found = {"id": self.model, "object": "model", "owned_by": "jaxformer"}
        return self._send(200, {"object": "list", "data": [found]})

    def do_POST(self) -> None:
        """An answer."""
        said = self.headers.get("Content-Length", "")
        if not (said.isascii() and said.isdecimal()):
            return self._refuse(411, "the request does not say its length; send Content-Length")
        length = int(said)
        if length > MOST:
            return self._refuse(413, f"the request has {length} bytes; send at most {MOST}")
        body = self.rfile.read(length)
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self._refuse(404, f"{self.path}: there is none; use /v1/chat/completions")
        try:
            text = self.answer(*asked(body))
        except InputError as error:
            return self._refuse(400, str(error))
        except Exception as error:  # A client hears of it, and the server's own log.
            self._refuse(
                500, f"the model failed ({type(error).__name__}); see the server's log"
            )
            raise
        return self._send(200, completion(self.model, text))

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of what goes well."""

    def _refuse(self, status: int, why: str) -> None:
        error = {"message": why, "type": "invalid_request_error"}
        self._send(status, {"error": error})

    def _send(self, status: int, found: dict[str, Any]) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def server(answer: Answer, model: str, host: str, port: int) -> http.server.HTTPServer:
    """A server that is bound and does not run yet; port 0 is any that is free."""
    lock = threading.Lock()  # One question at a time, though a slow client hinders no other.

    def one(*question: Any) -> str:
        with lock:
            return answer(*question)

    handler = functools.partial(Handler, answer=one, model=model)
    try:
        return http.server.ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise InputError(f"{host}:{port}: cannot be bound ({error.strerror})") from None


def answers(experiment: Any, checkpoint: str, config: str) -> Answer:
    """What a trained config with a task `vqa` answers, as `evaluate.ask` does."""
    task = asking(experiment, config)
    _, made, params = restored(experiment, checkpoint)
    words, size = asker(trained(experiment, made, params), task.test), task.test.source.size

    def answer(data: bytes, question: str) -> str:
        image = decoded(data, "the image", size)
        return " ".join(words(image, question))

    return answer


def answers_of_hub(path: str, template: str) -> Answer:
    """What a directory of the hub answers, see `evaluate.hub`."""
    words = hub.asker(path, hub.TEMPLATES[template])
    return lambda data, question: "".join(words(data, question)).strip()


@entry
def main(argv: list[str] | None = None) -> int:
    """Serves until it is interrupted; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluate.serve", description="A model behind an OpenAI-like address."
    )
    parser.add_argument("config", help="that of the run, or a directory of the hub")
    parser.add_argument("overrides", nargs="*", help="the run's, such as model.image=1")
    parser.add_argument("--checkpoint", help="a run's directory")
    parser.add_argument("--template", choices=list(hub.TEMPLATES), default="vicuna")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_intermixed_args(argv)
    if pathlib.Path(args.config).is_dir():
        answer = answers_of_hub(args.config, args.template)
    elif args.checkpoint is None:
        raise InputError(f"{args.config}: is a config; name its run by --checkpoint DIR")
    else:
        answer = answers(load(args.config, args.overrides), args.checkpoint, args.config)
    with server(answer, args.config, args.host, args.port) as running:
        print(f"http://{args.host}:{running.server_port}/v1 serves {args.config}", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
