"""A scripted server that speaks the protocol of OpenAI's chat completions."""

import contextlib
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reply(text, **more):
    """Return the body of a good reply."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage, **more}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Say nothing of a client that was killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class ScriptedServer:
    """Answers by `script`, a function of the number of times that a body came before and the body.

    `sent` is called after a whole good reply. The script returns status, headers and content; None drops the connection, and a shorter content than its length cuts the reply.
    """

    def __init__(self):
        self.script = lambda times, body: (200, {}, reply("42"))
        self.bodies, self.headers, self.answered = [], [], Counter()
        self.sent = lambda body: None
        self._times, self._lock = Counter(), threading.Lock()
        self._busy, self._idle = 0, threading.Condition()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                with owner.count_busy():
                    owner.handle(self)

            def log_message(self, *_):
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, handler):
        size = int(handler.headers["Content-Length"])
        text = handler.rfile.read(size).decode()
        if len(text.encode()) < size:  # the client was killed
            handler.close_connection = True
            return
        with self._lock:
            times, self._times[text] = self._times[text], self._times[text] + 1
            self.bodies.append(json.loads(text))
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        answer = self.script(times, json.loads(text))
        if answer is None:
            handler.close_connection = True
            return
        status, headers, content = answer
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)
        handler.wfile.flush()
        if int(headers.get("Content-Length", len(content))) != len(content):
            handler.close_connection = True
        elif status == 200:
            with self._lock:
                self.answered[text] += 1
            self.sent(json.loads(text))

    @contextlib.contextmanager
    def count_busy(self):
        """Count a request as being handled within the block."""
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def wait_until_idle(self):
        """Return when no request is being handled."""
        with self._idle:
            assert self._idle.wait_for(lambda: not self._busy, timeout=60)

    def close(self):
        """End the server."""
        self.server.shutdown()
        self.server.server_close()
