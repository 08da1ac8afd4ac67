"""Run the demo on the nano checkpoint with the bundled data: train, export, verify, evaluate, and answer questions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.check.recipes import load_recipe
from finetune.evaluation.token_loss import evaluate_path
from finetune.exporting.merge import export_result
from finetune.exporting.proof import BaseScores, ExportReport
from finetune.exporting.verify import LogitVerifier
from finetune.files.folders import check_output_free
from finetune.files.resources import find_demo_data, list_recipes
from finetune.models.opening import Reply, open_model
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

logger = logging.getLogger(__name__)

_QUESTIONS = ("Can you tell me who you are?", "请问中国的首都是哪里？", "Please name the capital of France.")
_LONGEST_ANSWER = 64


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo; losses are nats per trained token of held-out rows, before and after training."""

    run: str
    export: str
    verify: dict[str, object]
    bases: BaseScores | None
    loss_before: float
    loss_after: float
    answers: list[dict[str, str]]


def run_demo(output: Path, overrides: Sequence[str] = ()) -> DemoResult:
    """Train nano with nf4 LoRA, export it, and compare it with nano before training; `overrides` change the recipe.

    Raises:
        OutputError: `output` is not empty.
    """
    check_output_free(output)
    rows = [find_demo_data("demo_eval.jsonl")]
    resolved = load_recipe(list_recipes()["demo"], [f"output={output / 'run'}", *overrides])
    longest = resolved.recipe.data.max_tokens
    logger.info("1/4  before: nano is a tiny random network in YuLan-Mini's layout")
    before = evaluate_path("nano", rows, longest)
    answers_before = _ask("nano")
    logger.info("2/4  training a LoRA adapter on its 4-bit weights")
    run = Path(run_training(resolved).run)
    logger.info("3/4  merging into the full-precision base, and comparing")
    report = export_result(open_result(run), output / "export", ExportSettings(), LogitVerifier())
    logger.info("4/4  after: the exported model, opened like any other")
    after = evaluate_path(str(report.output), rows, longest)
    answers_after = _ask(str(report.output))
    return DemoResult(
        run=str(run),
        export=str(report.output),
        verify=_read_comparison(report),
        bases=report.bases,
        loss_before=before.loss,
        loss_after=after.loss,
        answers=[
            {"question": question, "before": first.text, "after": second.text, "stopped_by": second.stopped_by}
            for question, first, second in zip(_QUESTIONS, answers_before, answers_after, strict=True)
        ],
    )


def _ask(model: str) -> list[Reply]:
    loaded = open_model(model)
    return [loaded.answer(question, _LONGEST_ANSWER) for question in _QUESTIONS]


def _read_comparison(report: ExportReport) -> dict[str, object]:
    verify = report.verify
    return (
        {}
        if verify is None
        else {
            "max_abs": verify.max_abs,
            "kl": verify.kl,
            "top1_agreement": verify.top1_agreement,
            "rows": verify.rows,
        }
    )


def describe_demo(result: DemoResult) -> str:
    """Return the results as text for a person."""
    verify = result.verify
    lines = [
        "",
        "Held-out loss (nats per trained token)",
        f"  before {result.loss_before:.3f}   after {result.loss_after:.3f}   ({_draw_fall(result)})",
        "",
        "Export against base + adapter, on held-out rows, in float32",
        f"  largest difference of a logit {verify['max_abs']:.1e}, KL {verify['kl']:.1e}, "
        f"same likeliest token {verify['top1_agreement']:.0%}, {verify['rows']} rows",
        "",
        *_describe_bases(result.bases),
        "Answers (to questions that it was not trained on)",
    ]
    for item in result.answers:
        lines += [
            f"  Q  {item['question']}",
            f"     before: {_shorten(item['before']) or '(nothing but control tokens)'}",
            f"     after:  {_shorten(item['after'])}   [stopped by {item['stopped_by']}]",
        ]
    lines += [
        "",
        "Where everything lies",
        f"  run     {result.run}   (loss.png, metrics.jsonl, adapter/)",
        f"  export  {result.export}   (reopened with transformers; other programs: docs/export.md)",
        "",
        "The same with your own rows",
        f"  finetune chat {result.export}",
        "  finetune train recipes/demo.yaml -s data.train=my.jsonl -s data.eval=my_eval.jsonl -s output=runs/mine",
        "The same with the real model (8 GB card, see recipes/README.md)",
        "  finetune train recipes/sft_qlora.yaml -s data.train=my.jsonl",
    ]
    return "\n".join(lines)


def _describe_bases(bases: BaseScores | None) -> list[str]:
    if bases is None:
        return []
    return [
        "Held-out loss of the adapter on the 4-bit base that it was trained on, and merged (--base decides)",
        f"  as trained {bases.trained_loss:.3f}   full-precision base {bases.full.loss:.3f}   dequantized base {bases.dequantized.loss:.3f}",
        "",
    ]


def _draw_fall(result: DemoResult) -> str:
    return f"{1 - result.loss_after / result.loss_before:.0%} lower"


def _shorten(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
