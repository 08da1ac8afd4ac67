"""A server of OpenAI's completions with a real model behind it, such as vLLM is; what it gets wrong is set by its fields."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from finetune.evaluation.asking.generation import Generation, Prompt, generate_batch


class CompletionsServer:
    """Answers from `loaded`; `echoes` is whether it gives the likelihoods of prompts, `spoil` changes a text, `status` is that of each reply."""

    def __init__(self, loaded):
        self.loaded, self.names = loaded, ["served"]
        self.echoes, self.spoil, self.shift, self.status = True, lambda text: text, 0.0, 200
        self.bodies, self.lock = [], threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                data = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in owner.names]
                owner.send(self, 200, {"object": "list", "data": data})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.bodies.append(body)
                    owner.send(self, *owner.answer(body))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def send(self, handler, status, content):
        body = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def answer(self, body):
        if self.status != 200:
            return self.status, {"error": {"message": "no more"}}
        if body.get("echo") and not self.echoes:
            return 400, {"error": {"message": "Only no echo is supported"}}
        choice = (
            self.read(body["prompt"]) if body.get("echo") else {"text": self.spoil(self.write(body)), "logprobs": None}
        )
        return 200, {
            "id": "x",
            "object": "text_completion",
            "created": 0,
            "model": "served",
            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
        }

    def write(self, body):
        settings = Generation(body["max_tokens"], tuple(body.get("stop", ())), body["temperature"])
        loaded = self.loaded
        return generate_batch(loaded.model, loaded.tokenizer, loaded.stop_tokens, [Prompt(body["prompt"])], settings)[
            0
        ].text

    def read(self, ids):
        with torch.no_grad():
            logits = torch.log_softmax(self.loaded.model(torch.tensor([ids])).logits[0].float(), -1)
        own = [float(logits[place, ids[place + 1]]) - self.shift for place in range(len(ids) - 1)]
        best = [float(logits[place].max()) - self.shift for place in range(len(ids))]
        tops = [None, *({"own": value, "best": top} for value, top in zip(own, best, strict=False)), {"best": best[-1]}]
        logprobs = {
            "tokens": ["?"] * (len(ids) + 1),
            "token_logprobs": [None, *own, best[-1]],
            "top_logprobs": tops,
            "text_offset": [],
        }
        return {"text": "?", "logprobs": logprobs}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
