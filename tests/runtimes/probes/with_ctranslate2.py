"""Convert a folder for CTranslate2 and print as JSON what it does: `with_ctranslate2.py CASE.json`. Needs no part of the kit."""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
import numpy
from transformers import AutoTokenizer


def main(case):
    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    with tempfile.TemporaryDirectory() as parent:
        converted = ctranslate2.converters.TransformersConverter(case["folder"]).convert(f"{parent}/model")
        generator = ctranslate2.Generator(converted, device="cpu", intra_threads=1)
        rows = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in case["rows"][:4]]
        logits = [numpy.array(generator.forward_batch([row]))[0, -1].tolist() for row in rows]
        return {"logits": logits, "answers": [answer(generator, tokenizer, text) for text in case["questions"]]}


def answer(generator, tokenizer, question):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    tokens = tokenizer.convert_ids_to_tokens(prompt["input_ids"])
    # It stops at the tokenizer's end of text only, unless it is told the tokens that generation_config.json names.
    found = generator.generate_batch(
        [tokens],
        max_length=48,
        sampling_topk=1,
        end_token=[2, 106],
        return_end_token=True,
        include_prompt_in_result=False,
    )
    return found[0].sequences_ids[0]


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
