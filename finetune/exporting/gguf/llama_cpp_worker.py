"""Run one GGUF file in llama.cpp, in a process of its own: a fault in its C++ code ends that process and not the export.

`python -m finetune.exporting.gguf.llama_cpp_worker` reads a job as JSON from standard input, and writes what it found into the folder
that the job names. The server inside the binding listens on this machine only.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy
import xllamacpp

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see it


def run(job: dict[str, Any]) -> None:
    """Tokenize, score and answer what a job asks for, and write `found.json` and `scores.npy`."""
    folder = Path(job["output"])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["file"]
    parameters.n_ctx = job["context"]
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
    # By default keys and values are kept in float16, whose rounding is no part of the file.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    address = server.listening_address
    whole = {"add_special": True, "parse_special": True}
    prompts = [_post(address, "/apply-template", {"messages": messages})["prompt"] for messages in job["chats"]]
    found = {
        "ids": [_post(address, "/tokenize", {"content": text, **whole})["tokens"] for text in job["texts"]],
        # A rendered row begins with its own bos.
        "rows": [
            _post(address, "/tokenize", {**whole, "content": text, "add_special": False})["tokens"]
            for text in job["rows"]
        ],
        "prompts": [_post(address, "/tokenize", {"content": text, **whole})["tokens"] for text in prompts],
        "answers": [_answer(address, ids, job["longest"]) for ids in job["questions"]],
    }
    scores = numpy.stack([_score(address, ids, job["vocabulary"], job["forced"]) for ids in job["contexts"]])
    numpy.save(folder / "scores.npy", scores)
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _post(address: str, path: str, content: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(content).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with _OPENER.open(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def _answer(address: str, ids: list[int], longest: int) -> dict[str, Any]:
    options = {"temperature": 0, "cache_prompt": False, "return_tokens": True, "n_predict": longest}
    answer = _post(address, "/completion", {"prompt": ids, **options})
    return {"ids": answer["tokens"], "stopped": answer["stop_type"] == "eos"}


def _score(address: str, ids: list[int], vocabulary: int, forced: int) -> numpy.ndarray[Any, Any]:
    """Return the log-probability of every token behind a context.

    The server keeps them back while what it generates is a part of a character, so it must generate `forced`; that changes what is
    sampled, not what is reported.
    """
    options = {"temperature": 0, "cache_prompt": False, "n_predict": 1, "n_probs": vocabulary}
    answer = _post(address, "/completion", {"prompt": ids, "logit_bias": [[forced, 10_000.0]], **options})
    scores = numpy.full(vocabulary, -numpy.inf)
    for row in answer["completion_probabilities"][0]["top_logprobs"]:
        scores[row["id"]] = row["logprob"]
    return scores


if __name__ == "__main__":
    run(json.load(sys.stdin))
