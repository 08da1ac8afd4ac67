"""Ask an exported model a question with transformers alone. Anybody who gets the folder can do this without the kit.

python examples/open_export.py exports/mine "Who are you?"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def ask(folder: str, question: str) -> str:
    """Return the model's answer; it ends at the stop tokens in the folder's generation_config.json."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(ask(sys.argv[1], sys.argv[2]))
