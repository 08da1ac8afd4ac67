"""The runs whose memory is compared with their plan, and the rows and overrides that each needs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts.settings import TEMPLATE, Setting
from transformers import PreTrainedTokenizerBase

from finetune.data.encoding.tokenizer import load_tokenizer

GIB = 2**30
ROWS = 12
# Marks that no merge joins: with every tokenizer of this family each is one token, so that the length of a row is known.
MARK, OTHER_MARK = "%", "^"


@dataclass(frozen=True)
class Case:
    """One recipe with its overrides; `tokens` is the length of every row, `card_gib` the card that it has to fit.

    One that needs a large card for itself is measured `alone`.
    """

    name: str
    recipe: str
    tokens: int
    overrides: tuple[str, ...] = ()
    card_gib: float | None = None
    alone: bool = False


# The most important first, and of these the cheap ones, as the measurement may run out of time.
STREAMED = ("model.stream_layers=true",)
CASES = (
    Case("sft_qlora, 2,048 tokens", "sft_qlora", 2048, card_gib=6),
    Case("streamed sft_qlora, 2,048 tokens", "sft_qlora", 2048, STREAMED, card_gib=4),
    Case("sft_lora, 2,048 tokens", "sft_lora", 2048),
    Case("sft_full, 2,048 tokens", "sft_full", 2048),
    Case("dpo_qlora, 2,048 tokens", "dpo_qlora", 2048),
    Case("sft_qlora, 1,024 tokens", "sft_qlora", 1024),
    Case("sft_qlora, 4,096 tokens", "sft_qlora", 4096),
    Case("sft_qlora, 8,192 tokens", "sft_qlora", 8192),
    Case("anneal, 28,672 tokens", "anneal", 28672, ("optimizer.states=fresh",)),
    Case("sft_qlora, 28,672 tokens", "sft_qlora", 28672),
    Case("tiers/4gb", "tiers/4gb", 4096, card_gib=4),
    Case("tiers/6gb", "tiers/6gb", 4096, card_gib=6),
    Case("tiers/12gb", "tiers/12gb", 8192, card_gib=12),
    Case("tiers/24gb", "tiers/24gb", 4096, card_gib=24),
    Case("tiers/8gb", "tiers/8gb", 28672, card_gib=8),
    Case("tiers/16gb", "tiers/16gb", 28672, card_gib=16),
    Case(
        "streamed sft_qlora, 28,672 tokens",
        "sft_qlora",
        28672,
        (*STREAMED, "trainer.activation_offloading=true"),
        card_gib=6,
    ),
    Case("tiers/80gb", "tiers/80gb", 28672, card_gib=80, alone=True),
)
REHEARSED = (
    Case("sft_qlora, 128 tokens", "sft_qlora", 128),
    Case("sft_lora, 128 tokens", "sft_lora", 128),
    Case("sft_qlora, 128 tokens, streamed", "sft_qlora", 128, STREAMED),
    Case("dpo_qlora, 128 tokens", "dpo_qlora", 128),
    Case(
        "anneal, 128 tokens",
        "anneal",
        64,
        ("optimizer.states=fresh", "model.max_positions=null"),
    ),
    Case("sft_full, 128 tokens", "sft_full", 128, alone=True),
)


def write_rows(folder: Path, case: Case, base: Path) -> Path:
    """Write rows of exactly `case.tokens` tokens; return the file."""
    make, tokenizer = _ROWS.get(case.recipe, _make_conversation), load_tokenizer(base / "llama")
    marks = case.tokens * (3 if case.recipe == "anneal" else 1)
    if case.recipe != "anneal":
        marks -= count_template_tokens(tokenizer)
    path = folder / f"{case.recipe.replace('/', '_')}_{case.tokens}.jsonl"
    rows = (make(f"{number:04d}", MARK * marks) for number in range(ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_conversations(path: Path, setting: Setting, base: Path) -> None:
    """Write the rows that all steps of a setting take, each of the same length."""
    answer = MARK * (setting.row_tokens - count_template_tokens(load_tokenizer(base)))
    rows = (_make_conversation(f"{number:04d}", answer) for number in range(setting.row_count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def count_template_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a conversation of a question of 4 digits has beside its answer.

    Raises:
        ValueError: a mark is not one token.
    """
    template = TEMPLATE.read_text(encoding="utf-8")

    def count(marks: int) -> int:
        messages = _make_conversation("0000", MARK * marks)["messages"]
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    beside = count(50) - 50
    if count(10) - 10 != beside:
        raise ValueError("a mark is not one token with this tokenizer")
    return beside


def _make_conversation(number: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": number}, {"role": "assistant", "content": answer}]}


def _make_pair(number: str, answer: str) -> dict[str, Any]:
    return {"prompt": number, "chosen": answer, "rejected": answer.replace(MARK, OTHER_MARK)}


def _make_text(number: str, answer: str) -> dict[str, Any]:
    return {"text": number + answer}


_ROWS: Mapping[str, Callable[[str, str], dict[str, Any]]] = {"anneal": _make_text, "dpo_qlora": _make_pair}


def list_overrides(case: Case, base: Path, rows: Path, output: Path) -> list[str]:
    """Return what makes a recipe a run of two steps, of two micro-batches each, with every row full."""
    anneals = case.recipe == "anneal"
    checkpoint = base / ("native" if anneals else "llama")
    steps = [f"schedule.length={4 * case.tokens}"] if anneals else ["trainer.max_steps=2", "trainer.warmup_steps=0"]
    return [
        f"model.checkpoint={checkpoint}",
        f"data.train={rows}",
        f"data.max_tokens={case.tokens}",
        "data.held_out=0",
        f"output={output}",
        "answers=0",
        "trainer.gradient_accumulation_steps=2",
        "trainer.logging_steps=1",
        "trainer.save_strategy=no",
        "trainer.disable_tqdm=true",
        *steps,
        *case.overrides,
    ]


def list_cases(is_rehearsal: bool) -> Sequence[Case]:
    """Return the cases of the real size, or those of nano."""
    return REHEARSED if is_rehearsal else CASES
