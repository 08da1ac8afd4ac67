"""Open a folder in vLLM on a CPU, and print as JSON what it does: `with_vllm.py CASE.json`. Needs no part of the kit."""

import json
import os
import sys
from pathlib import Path

# One process, a small cache, and nothing sent anywhere; vLLM reads them while it is imported.
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(case):
    lora = {"enable_lora": True, "max_lora_rank": case["rank"]} if case["adapter"] else {}
    # The chat template lies beside the adapter.
    model = LLM(
        case["base"],
        tokenizer=case["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_logprobs=-1,
        **lora,
    )
    adapter = LoRARequest("adapter", 1, case["folder"]) if case["adapter"] else None
    tokenizer = model.get_tokenizer()
    # Rows of the table that belong to no token have no text, and making texts of all log-probabilities fails at them.
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    rows = [{"prompt_token_ids": row["input_ids"]} for row in case["rows"][:4]]
    scored = [found.outputs[0].logprobs[0] for found in model.generate(rows, one, lora_request=adapter, use_tqdm=False)]
    asked = [[{"role": "user", "content": question}] for question in case["questions"]]
    greedy = SamplingParams(temperature=0, max_tokens=48)
    answers = [found.outputs[0] for found in model.chat(asked, greedy, lora_request=adapter, use_tqdm=False)]
    return {
        "ids": [tokenizer(text)["input_ids"] for text in case["texts"]],
        "chats": [
            tokenizer.apply_chat_template(
                chat["messages"], tools=chat.get("tools"), add_generation_prompt=True, tokenize=False
            )
            for chat in case["chats"]
        ],
        "logits": [[scores[number].logprob for number in range(len(scores))] for scores in scored],
        "answers": [list(found.token_ids) for found in answers],
        "stopped": [found.finish_reason for found in answers],
    }


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
