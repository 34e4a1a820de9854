"""A server that answers chat completions at once, to be asked by the load generator: `answering.py PORT`."""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Chat(BaseHTTPRequestHandler):
    """Streams `max_tokens` words, or as many as `model` says where that is a number.

    The first tells what was asked: its hash.
    """

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        count = int(asked["model"]) if asked["model"].isdigit() else asked["max_tokens"]
        asked_hash = hashlib.sha256(json.dumps(asked["messages"]).encode()).hexdigest()
        words = [asked_hash, *["word"] * (count - 1)]
        self.send_response(200)
        self.end_headers()
        if not asked.get("stream"):
            message = {"message": {"content": " ".join(words)}}
            answer = {"choices": [message], "usage": {"completion_tokens": count}}
            self.wfile.write(json.dumps(answer).encode())
            return
        for number, word in enumerate(words):
            ends = "length" if number == count - 1 else None
            self._send({"choices": [{"delta": {"content": f"{word} "}, "finish_reason": ends}]})
        self._send({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: dict[str, object]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Nothing: the default writes a line a request."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Chat).serve_forever()
