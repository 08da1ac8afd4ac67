"""Write the model card of an export: where it comes from, how close it is to what was trained, how to open it."""

import html
import re
from importlib.metadata import version
from pathlib import Path

from finetune.exporting.merged import Subject
from finetune.exporting.proof import BaseScores, Comparison, ExportReport

_BASE_NAMES = {"full": "full-precision", "dequantized": "dequantized"}


def write_card(folder: Path, subject: Subject, report: ExportReport, *, changes_nothing: bool) -> None:
    """Write `README.md` into an export."""
    text = "\n\n".join(
        [
            "---\nlicense: mit\nlanguage: [en, zh]\npipeline_tag: text-generation\nlibrary_name: transformers\n---",
            "# YuLan-Mini, fine-tuned",
            _describe_origin(subject, report),
            *(["The adapter is empty: this export equals its base model."] if changes_nothing else []),
            *([_describe_bases(report.bases, report.base)] if report.bases else []),
            _describe_comparison(report.verify),
            _describe_use(),
        ]
    )
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _describe_origin(subject: Subject, report: ExportReport) -> str:
    rows = [("chat template", subject.template.name)]
    lineage = subject.result.lineage
    if lineage is not None:
        merged = f"a LoRA adapter, merged into the {_BASE_NAMES[report.base]} base"
        rows = [
            ("base checkpoint", lineage.earlier[0].checkpoint if lineage.earlier else lineage.checkpoint),
            ("method", lineage.method),
            *([("chain", lineage.describe_chain())] if lineage.earlier else []),
            ("trained", "all weights" if subject.adapter is None else merged),
            *([("architecture while training", "native, folded here")] if lineage.architecture == "native" else []),
            ("base model while training", "unquantized" if lineage.quantize == "none" else lineage.quantize),
            *rows,
        ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_escape(value)} |" for name, value in rows)])


def _escape(value: str) -> str:
    """Return a name from a recipe or a record as plain text of a Markdown table: no mark-up, no link, no second cell."""
    text = html.escape(" ".join(value.split()), quote=False)
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", text).replace("://", ":&#47;&#47;")


def _describe_bases(bases: BaseScores, chosen: str) -> str:
    lines = [
        "## Which base the adapter was merged into",
        "",
        f"The adapter was trained on a quantized base. On {bases.rows} held-out rows ({bases.tokens:,} trained tokens), against "
        "the model as it was trained:",
        "",
        "| | held-out loss, nats | mean KL, nats | same likeliest token |",
        "|---|---|---|---|",
        f"| as trained: the adapter on the quantized base | {bases.trained_loss:.4f} | | |",
    ]
    for kind, score in (("full", bases.full), ("dequantized", bases.dequantized)):
        here = " (this folder)" if kind == chosen else ""
        lines.append(
            f"| merged into the {_BASE_NAMES[kind]} base{here} | {score.loss:.4f} | {score.kl:.2e} | {score.top1_agreement:.2%} |"
        )
    return "\n".join(lines)


def _describe_comparison(comparison: Comparison | None) -> str:
    heading = "## Compared with what was trained"
    if comparison is None:
        return f"{heading}\n\nNot compared."
    lines = [
        heading,
        "",
        "Every tensor equals the merge rounded once, to the bit. In float32, on held-out rows "
        f"(the base with the adapter applied live, against this folder reopened by transformers {version('transformers')}):",
        "",
        "| largest difference of a logit | mean KL, nats | same likeliest token | rows | positions |",
        "|---|---|---|---|---|",
        f"| {comparison.max_abs:.2e} | {comparison.kl:.2e} | {comparison.top1_agreement:.2%} "
        f"| {comparison.rows} | {comparison.positions} |",
    ]
    if comparison.texts:
        lines += ["", f"The reopened tokenizer gives the tokens that were trained, on {comparison.texts} stored rows."]
    if comparison.effect_kl is not None:
        lines += ["", f"The adapter itself moved its base by a KL of {comparison.effect_kl:.3g} nats on the same rows."]
    return "\n".join(lines)


def _describe_use() -> str:
    return """## Use

Plain Llama weights with one chat template. `config.json` and `generation_config.json` name the same tokens that end an answer.
The tokenizer's own `eos_token` is only one of them: a program that stops at nothing else must be told the others.

No program that serves models was tried with this folder.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```"""
