"""Write the model card of an export: where it comes from, how close it is to what was trained, how to open it."""

import html
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from finetune.checkpoints.checkpoint_table import CHECKPOINTS, find_alias, split_hub_id
from finetune.errors import describe_count
from finetune.exporting.merged import Subject
from finetune.exporting.proof import BaseScores, Comparison, ExportReport, GgufReport, describe_tolerance
from finetune.files.sizes import describe_size
from finetune.models.plain_adapter import describe_use
from finetune.runs.lineage import find_base_name, name_base
from finetune.yulan.layout import PUBLISHED_SIZES, read_config

_FRONT_MATTER = re.compile(r"---\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^license: *([\w.+-]+) *$", re.MULTILINE)
_BASE_NAMES = {"full": "full-precision", "dequantized": "dequantized"}


def write_card(folder: Path, subject: Subject, report: ExportReport, *, changes_nothing: bool) -> None:
    """Write `README.md` into an export."""
    text = "\n\n".join(
        [
            _describe_base(subject),
            _describe_origin(subject, report),
            *(["The adapter is empty: this export equals its base model."] if changes_nothing else []),
            *([_describe_bases(report.bases, report.base)] if report.bases else []),
            _describe_comparison(report.verify, report.dtype),
            *([_describe_gguf(report.gguf)] if report.gguf else []),
            *([f"## Tokenizer\n\n{subject.lost_legacy}."] if subject.lost_legacy else []),
            _describe_use(),
            *([f"## The adapter alone\n\n{_capitalise(describe_use(subject.adapter))}."] if subject.adapter else []),
        ]
    )
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _describe_base(subject: Subject) -> str:
    """Return the front matter and the title: name and licence of the base, as far as they are known.

    Source of YuLan-Mini's licence and languages: the authors' model card.
    """
    facts = ["pipeline_tag: text-generation", "library_name: transformers"]
    if _is_yulan_mini(subject):
        return "\n".join(["---", "license: mit", "language: [en, zh]", *facts, "---", "", "# YuLan-Mini, fine-tuned"])
    name, licence = find_base_name(subject.result) or subject.base.name, _read_licence(subject.base)
    lines = [
        "---",
        *([f"license: {licence}"] if licence else []),
        *facts,
        "---",
        "",
        f"# {Path(name).name}, fine-tuned",
    ]
    if licence is None:
        lines += [
            "",
            "The base names no licence that could be read here; look at where it comes from before you pass this folder on.",
        ]
    return "\n".join(lines)


def _is_yulan_mini(subject: Subject) -> bool:
    """Tell whether the base is a published YuLan-Mini checkpoint: by its name, its architecture or all of its sizes."""
    name = find_base_name(subject.result) or ""
    repositories = {checkpoint.repository for checkpoint in CHECKPOINTS}
    if find_alias(name) is not None or split_hub_id(name)[0] in repositories or subject.architecture == "yulanmini":
        return True
    config = read_config(subject.base)
    return all(config.get(key) == PUBLISHED_SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers"))


def _read_licence(base: Path) -> str | None:
    """Return the licence that the base's own card names in its front matter, if there is one."""
    card = base / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    front = _FRONT_MATTER.match(text)
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else None


def _describe_origin(subject: Subject, report: ExportReport) -> str:
    rows = [("chat template", subject.form.name)]
    lineage = subject.result.lineage
    if lineage is not None:
        merged = f"a LoRA adapter, merged into the {_BASE_NAMES[report.base]} base"
        rows = [
            ("base checkpoint", name_base(lineage)),
            *([("data sets of the hub", ", ".join(lineage.datasets))] if lineage.datasets else []),
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
        f"The adapter was trained on a quantized base. On {describe_count(bases.rows, 'held-out row')} ({describe_count(bases.tokens, 'trained token')}), against "
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


def _describe_comparison(comparison: Comparison | None, dtype: str) -> str:
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
        "",
        f"{_capitalise(describe_tolerance(comparison, dtype))}.",
    ]
    if comparison.texts:
        lines += ["", f"The reopened tokenizer gives the tokens that were trained, on {comparison.texts} stored rows."]
    if comparison.effect_kl is not None:
        lines += ["", f"The adapter itself moved its base by a KL of {comparison.effect_kl:.3g} nats on the same rows."]
    return "\n".join(lines)


def _describe_gguf(files: Sequence[GgufReport]) -> str:
    lines = [
        "## GGUF files for llama.cpp and Ollama",
        "",
        "Made from the weights of this folder. Give Ollama a GGUF file by its Modelfile, never the folder: its importer takes the "
        "tokenizer for another kind. KL is against this folder in float32.",
        "",
        "| file | size | values within half a step of their source | in llama.cpp: mean KL, nats | greedy answers equal | stop by themselves |",
        "|---|---|---|---|---|---|",
    ]
    for file in files:
        scores = file.llama_cpp
        run = "not run | |"
        if scores is not None:
            run = f"{scores.kl:.2e} | {scores.same_answers} of {scores.answers} | {scores.stopped} of {scores.stopped_there} |"
        proof = f"all {describe_count(file.tensors, 'tensor')}" if file.tensors else "not compared"
        lines.append(f"| `{file.output.name}` | {describe_size(file.bytes)} | {proof} | {run}")
    ran = [file.llama_cpp for file in files if file.llama_cpp is not None]
    if ran:
        rows = f", and {ran[0].rows} stored rows become the tokens that were trained" if ran[0].rows else ""
        lines += [
            "",
            f"llama.cpp by xllamacpp {ran[0].version}: the tokens of {describe_count(ran[0].texts, 'text')} are equal, control tokens included{rows}.",
        ]
    return "\n".join(lines)


def _describe_use() -> str:
    return """## Use

Plain Llama weights with one chat template. `config.json` and `generation_config.json` name the same tokens that end an answer.
The tokenizer's own `eos_token` is only one of them: a program that stops at nothing else must be told the others.

No program that serves models was tried with this folder. For llama.cpp and Ollama write a GGUF file with
`finetune gguf FOLDER -o FILE --type q8_0`. Give them neither the folder nor a file of llama.cpp's own converter: both programs read
the tokens of a chat template as plain text, and the model is then asked in other tokens than it was trained on.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```"""


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]
