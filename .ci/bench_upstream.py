#!/usr/bin/env python3
"""The fake upstream of bench.py: Messages and Chat Completions, in bytes built beforehand.

    python3 .ci/bench_upstream.py FD        serve on the listening socket that FD inherits

A prompt with "Answer in 20 chunks, 5 ms apart" says how to answer. Chunks that are not 0 ms apart
begin with the time of their sending, so that the client knows how late each of them comes. It is
for measuring alone: what an upstream may say or refuse belongs to FakeUpstream in test_ogx.py, and
for real clients to .ci/clients/scripted_upstream.py.
"""
import asyncio
import functools
import gc
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, Optional

Json = dict[str, Any]
PIECES = ("The ", "quick ", '"fox" ', "jumps\n", "caf\u00e9 \u2014 ", "\U0001f600 ", "\\n ",
          "{}[] ", "</b>\t", "over ", "123 ")
TIME = "t{:017.6f} "
NO_TIME = TIME.format(0)
WISH = re.compile(rb"Answer in (\d+) chunks, (\d+) ms apart")
USAGE = {"prompt_tokens": 25, "completion_tokens": 20, "total_tokens": 45}
MESSAGE = {"id": "msg_bench", "type": "message", "role": "assistant", "model": "bench",
           "stop_sequence": None}


class Upstream(asyncio.Protocol):
    """One connection of a server of both formats that sends bytes built beforehand."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.received = bytearray()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head_end = self.received.find(b"\r\n\r\n") + 4
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.received[:max(0, head_end)])
        if head_end >= 4 and len(self.received) >= head_end + (int(length[1]) if length else 0):
            request, self.received = bytes(self.received), bytearray()
            self.answer(request)

    def answer(self, request: bytes) -> None:
        wish = WISH.match(request, max(0, request.rfind(b"Answer in ")))
        if not wish:
            models = [{"id": "bench", "object": "model", "created": 1, "owned_by": "bench"}]
            self.transport.write(http_json({"object": "list", "data": models}))
            return
        count, delay, native = int(wish[1]), int(wish[2]), b"/messages" in request[:40]
        if b'"stream": true' not in request and b'"stream":true' not in request:
            self.transport.write(whole_answer(native, count))
        elif delay:
            chunks = iter(stream_answer(native, count, True))
            self.transport.write(next(chunks))
            self.pace(chunks, delay / 1000, time.monotonic())
        else:
            for chunk in stream_answer(native, count, False):
                self.transport.write(chunk)

    def pace(self, chunks: Iterator[bytes], delay: float, due: float) -> None:
        """Write one chunk, and come back for the next when it is due."""
        chunk = next(chunks, None)
        if chunk and not self.transport.is_closing():
            now = TIME.format(time.monotonic()).encode()
            self.transport.write(chunk.replace(NO_TIME.encode(), now))
            due += delay
            asyncio.get_running_loop().call_at(due, self.pace, chunks, delay, due)


@functools.cache
def stream_answer(native: bool, count: int, paced: bool) -> list[bytes]:
    """The writes of a streamed answer: head and beginning, one per piece of text, then the end."""
    head = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"x-request-id: req_bench\r\nTransfer-Encoding: chunked\r\n\r\n")
    if native:
        message = {**MESSAGE, "content": [], "stop_reason": None, "usage": {"input_tokens": 25}}
        begin = (event("message_start", message=message)
                 + event("content_block_start", index=0, content_block=block("")))
        texts = [event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
                 for text in pieces(count, paced)]
        end = (event("content_block_stop", index=0)
               + event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None},
                       usage={"output_tokens": 20})
               + event("message_stop"))
    else:
        begin = chat_chunk({"role": "assistant", "content": ""})
        texts = [chat_chunk({"content": text}) for text in pieces(count, paced)]
        end = chat_chunk({}, "stop") + chat_chunk(None) + b"data: [DONE]\n\n"
    return [head + http_chunk(begin), *map(http_chunk, texts), http_chunk(end) + b"0\r\n\r\n"]


@functools.cache
def whole_answer(native: bool, count: int) -> bytes:
    text = "".join(pieces(count, False))
    if native:
        return http_json({**MESSAGE, "content": [block(text)], "stop_reason": "end_turn",
                          "usage": {"input_tokens": 25, "output_tokens": 20}})
    message = {"role": "assistant", "content": text, "refusal": None}
    return http_json({"id": "chatcmpl-bench", "object": "chat.completion", "created": 1,
                      "model": "bench", "usage": USAGE, "choices": [
                          {"index": 0, "message": message, "finish_reason": "stop"}]})


def pieces(count: int, paced: bool) -> list[str]:
    return [NO_TIME * paced + PIECES[index % len(PIECES)] for index in range(count)]


def block(text: str) -> Json:
    return {"type": "text", "text": text}


def chat_chunk(delta: Optional[Json], finish: Optional[str] = None) -> bytes:
    """One server-sent event; the one without a delta tells the usage."""
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    chunk = {"id": "chatcmpl-" + "Bench" * 5, "object": "chat.completion.chunk", "created": 1,
             "model": "bench", "service_tier": "default", "system_fingerprint": "fp_bench",
             **({"choices": [], "usage": USAGE} if delta is None else
                {"choices": choices, "usage": None})}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def event(kind: str, **fields: Any) -> bytes:
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def http_json(data: Json) -> bytes:
    body = json.dumps(data).encode()
    return (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body))


async def serve_upstream(listener: socket.socket) -> None:
    gc.disable()
    server = await asyncio.get_running_loop().create_server(Upstream, sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_upstream(socket.socket(fileno=int(sys.argv[1]))))
