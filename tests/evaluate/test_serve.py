import base64
import http.client
import io
import json
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from evaluate import serve
from jaxformer.errors import InputError


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 8), 200, np.uint8)).save(file, "PNG")
    return file.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(*parts, **more) -> dict:
    return {"model": "any", "messages": [{"role": "user", "content": list(parts)}], **more}


TEXT = {"type": "text", "text": "what is the sum ?"}
IMAGE = {"type": "image_url", "image_url": {"url": url(picture())}}


@pytest.fixture
def address():
    def answer(data: bytes, question: str) -> str:
        if question == "what is love ?":
            raise InputError("'love' is no word of the scenes")
        with Image.open(io.BytesIO(data)) as image:
            return f"{question} {image.size}"

    with serve.server(answer, "ours", "127.0.0.1", 0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()
        thread.join()


def send(address: str, body) -> tuple[int, dict]:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data)) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_question_with_an_image_is_answered(address):
    before = {"role": "user", "content": "another question"}
    body = chat(TEXT, IMAGE)
    body["messages"].insert(0, before)
    status, found = send(f"{address}/chat/completions", body)
    assert status == 200 and found["object"] == "chat.completion" and found["model"] == "ours"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "what is the sum ? (8, 4)"}
    assert choice["finish_reason"] == "stop"
    status, found = send(f"{address}/models", None)
    assert status == 200 and [model["id"] for model in found["data"]] == ["ours"]


def test_what_is_wrong_is_told_and_the_server_goes_on(address):
    love = {"type": "text", "text": "what is love ?"}
    status, found = send(f"{address}/chat/completions", chat(love, IMAGE))
    assert status == 400 and found["error"]["message"] == "'love' is no word of the scenes"
    assert send(f"{address}/completions", chat(TEXT, IMAGE))[0] == 404
    assert send(f"{address}/chat/completions", chat(TEXT, IMAGE))[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON"),
        ([1], 'has no "messages"'),
        ({"messages": [{"role": "system", "content": "be kind"}]}, 'no message of "user"'),
        (chat(IMAGE), "the question is empty"),
        (chat(TEXT), "the question has 0 images; send it with one"),
        (chat(TEXT, IMAGE, IMAGE), "has 2 images"),
        (chat(TEXT, IMAGE, stream=True), "stream and n are not known here"),
        (chat(TEXT, {"type": "image_url", "image_url": {"url": "http://a/b.png"}}), "data URL"),
        (
            chat(TEXT, {"type": "image_url", "image_url": "data:image/png;base64,?"}),
            "is not base64",
        ),
        (
            chat(TEXT, {"type": "image_url", "image_url": "data:image/png;base64,\u00e9"}),
            "is not base64",
        ),
        (b"[" * 100_000, "the body is not JSON"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_in_a_sentence(body, said):
    with pytest.raises(InputError, match=said):
        serve.asked(body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize("length", ["-1", "many", None])
def test_a_request_of_no_length_is_refused(address, length):
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    with connection.getresponse() as reply:
        assert reply.status == 411 and b"send Content-Length" in reply.read()
    connection.close()


def test_a_client_that_is_silent_hinders_no_other(address):
    host, port = address.split("/")[2].split(":")
    with socket.create_connection((host, int(port))):
        assert send(f"{address}/models", None)[0] == 200
