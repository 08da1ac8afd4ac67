"""The model card of an export: where it comes from, how near it is to what was trained, how to open it."""

from pathlib import Path

from finetune.data.template import ChatTemplate
from finetune.export.verify import Comparison
from finetune.train.record import Result


def write_card(
    folder: Path, result: Result, template: ChatTemplate, comparison: Comparison | None, *, changes_nothing: bool
) -> None:
    """Write `README.md` into an export."""
    text = "\n\n".join(
        [
            "---\nlicense: mit\nlanguage: [en, zh]\npipeline_tag: text-generation\nlibrary_name: transformers\n---",
            "# YuLan-Mini, fine-tuned",
            _describe_origin(result, template),
            *(["The adapter is empty: this export equals its base."] if changes_nothing else []),
            _describe_comparison(comparison),
            _describe_use(),
        ]
    )
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _describe_origin(result: Result, template: ChatTemplate) -> str:
    rows = [("chat template", template.name)]
    if result.origin is not None:
        origin = result.origin
        trained = "all weights" if result.kind == "model" else "a LoRA adapter, merged into the full-precision base"
        rows = [
            ("start", origin.checkpoint),
            ("method", origin.method),
            ("trained", trained),
            ("base while training", "unquantized" if origin.quantize == "none" else origin.quantize),
            *rows,
        ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _describe_comparison(comparison: Comparison | None) -> str:
    heading = "## Compared with what was trained"
    if comparison is None:
        return f"{heading}\n\nNot compared."
    lines = [
        heading,
        "",
        "Every tensor equals the merge rounded once, to the bit. In float32, on held-out rows "
        "(the base with the adapter applied live, against this folder reopened):",
        "",
        "| largest difference of a logit | mean KL, nats | same likeliest token | rows | positions |",
        "|---|---|---|---|---|",
        f"| {comparison.max_abs:.2e} | {comparison.kl:.2e} | {comparison.top1_agreement:.2%} "
        f"| {comparison.rows} | {comparison.positions} |",
    ]
    if comparison.effect_kl is not None:
        lines += ["", f"The adapter itself moved its base by a KL of {comparison.effect_kl:.3g} nats on the same rows."]
    return "\n".join(lines)


def _describe_use() -> str:
    return """## Use

Plain Llama weights with a chat template; generation stops at the tokens of `generation_config.json`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```

    vllm serve FOLDER
    python -m sglang.launch_server --model-path FOLDER
    python convert_hf_to_gguf.py FOLDER        # llama.cpp"""
