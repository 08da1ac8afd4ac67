"""Open a folder in mlx-lm on the CPU, and print as JSON what it does: `with_mlx.py CASE.json`. Needs no part of the kit."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load, stream_generate


def answer(model, tokenizer, question):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    replies = list(stream_generate(model, tokenizer, prompt, max_tokens=48))
    return [reply.token for reply in replies], replies[-1].finish_reason


def main(case):
    model, tokenizer = load(case["folder"])
    answers = [answer(model, tokenizer, question) for question in case["questions"]]
    return {
        "ids": [tokenizer.encode(text) for text in case["texts"]],
        "chats": [
            tokenizer.apply_chat_template(
                chat["messages"], tools=chat.get("tools"), add_generation_prompt=True, tokenize=False
            )
            for chat in case["chats"]
        ],
        "logits": [model(mx.array([row["input_ids"]]))[0, -1].tolist() for row in case["rows"][:4]],
        "answers": [tokens for tokens, _ in answers],
        "stopped": [reason for _, reason in answers],
    }


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
