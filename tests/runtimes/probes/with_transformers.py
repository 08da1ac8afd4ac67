"""Open a folder in whatever transformers this Python has, and print as JSON what it does: `with_transformers.py CASE.json`.

Runs in environments without the kit, from transformers 4.46 on.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def measure_loss(model, rows):
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens


def answer(model, tokenizer, question):
    """Answer as a program does that knows nothing but the folder: its template, its stop tokens, greedily."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def main(case):
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    model = AutoModelForCausalLM.from_pretrained(case["base"], torch_dtype=torch.float32).eval()
    if case["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, case["folder"]).eval()
    chats = [
        tokenizer.apply_chat_template(
            chat["messages"], tools=chat.get("tools"), add_generation_prompt=True, tokenize=False
        )
        for chat in case["chats"]
    ]
    with torch.no_grad():
        return {
            "version": transformers.__version__,
            "ids": [tokenizer(text)["input_ids"] for text in case["texts"]],
            "decoded": [tokenizer.decode(row["input_ids"]) for row in case["rows"]],
            "chats": chats,
            "chat_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in chats],
            "logits": [
                model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1].tolist() for row in case["rows"][:4]
            ],
            "loss": measure_loss(model, case["rows"]),
            "answers": [answer(model, tokenizer, question) for question in case["questions"]],
        }


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
