"""The results of gpu.py as Markdown."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_parts.lines import is_measured

Row = Mapping[str, Any]

# The parts that measure the speed of one program each, in the order of the table, and those that the ratios are of.
PROGRAMS = ("speed", "auto", "roomy", "plain", "unsloth")
OTHERS = ("plain", "unsloth")
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
NOTES = """\
Tokens a second and TFLOP/s are those of the median step. TFLOP/s are the model's own operations, without the repeats of gradient
checkpointing; "of attainable" is their share of the rate of one large product of bfloat16 matrices, measured in the same process. "GPU busy" is
the time of all kernels of one more step, beside the seconds of the median step. Packed steps hold as many tokens as the others, from rows of
a fourth of the length. TRL packs a batch into one long row and hands over no mask; transformers keeps the documents apart by their
positions (on a CPU, logits of documents packed by TRL 1.16 equal those of each alone within 4e-6)."""
UNSLOTH_NOTES = """\
Unsloth runs with its own gradient checkpointing, in its own process, with the libraries that it allows. Its kernels for the projections of
attention are not used, since those of YuLan-Mini have biases: it says so itself."""


def describe(results: Mapping[str, Any]) -> str:
    """Return all results as Markdown."""
    device = results["device"]
    versions = ", ".join(f"{name} {device[name]}" for name in LIBRARIES)
    where = f"{device['card']}, {device['memory'] / 2**30:.0f} GiB, CUDA {device['cuda']}" if device["card"] else "CPU"
    lines = [f"{where}; Python {device['python']}, {versions}. One run of each.", ""]
    lines += [*describe_tests(results.get("tests", [])), *describe_memory(results), "", *describe_speed(results), ""]
    lines += describe_export(results.get("export", []))
    lines += ["", describe_parts(results["parts"])]
    return "\n".join(lines) + "\n"


def describe_tests(tests: Iterable[Row]) -> list[str]:
    """Return how the tests ended, and the names of those that did not pass."""
    rows = list(tests)
    if not rows:
        return []
    counts = Counter(row["outcome"] for row in rows)
    line = "Tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), reverse=True))
    bad = [f"`{row['name']}` {row['outcome']}" for row in rows if row["outcome"] not in ("passed", "skipped")]
    return [line + (": " + ", ".join(bad) if bad else "") + ".", ""]


def describe_memory(results: Mapping[str, Any]) -> list[str]:
    """Return the table of measured and planned memory; what an earlier case left on the card is taken off."""
    plans = {row["name"]: row for row in results.get("plans", [])}
    lines = [
        "| run | held to, GiB | allocated as planned, GiB | measured | difference | reserved | in all as planned |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted([*results.get("memory", []), *results.get("large", [])], key=_order):
        plan = plans.get(row["name"], {"error": "not planned in time"})
        limit = f"{row['card_gib']:g}" if row.get("card_gib") else ""
        if not is_measured(row) or not is_measured(plan):
            lines.append(f"| {row['name']} | {limit} | {_find_reason(row) or _find_reason(plan)} |||||")
            continue
        allocated, reserved = row["allocated"] - row["left"], row["reserved"] - row["left"]
        lines.append(
            f"| {row['name']} | {limit} | {_gib(plan['allocated'])} | {_gib(allocated)} "
            f"| {allocated / plan['allocated'] - 1:+.1%} | {_gib(reserved)} | {_gib(plan['peak'])} |"
        )
    return lines


def _order(row: Row) -> list[tuple[int, str]]:
    """Order names as a person does, with 2,048 before 28,672; processes that share the cases end them in any order."""
    pieces = re.split(r"(\d+)", row["name"].replace(",", ""))
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def describe_speed(results: Mapping[str, Any]) -> list[str]:
    """Return the table of speed and memory, side by side, and what its columns mean."""
    # The settings of the programs beside which each is put, without rows that took other tokens.
    beside = [
        {
            row["setting"]: row["tokens_per_second"]
            for row in results.get(name, [])
            if "setting" in row and _is_alike(row)
        }
        for name in OTHERS
    ]
    lines = [
        "| setting | program | tokens/s | of plain TRL | of Unsloth | TFLOP/s | of attainable | GPU busy | kernels a step | allocated, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    others, versions = [], []
    for row in (row for name in PROGRAMS for row in results.get(name, [])):
        if "versions" in row:
            versions.append(
                row["name"].partition(":")[0] + " with " + ", ".join(" ".join(p) for p in row["versions"].items())
            )
        else:
            lines.append(_describe_program(row, beside))
            if "speed" in row:
                others.append(f"`model.speed: auto` of {row['name']}: {row['speed']['reason']}")
    notes = [NOTES, *([UNSLOTH_NOTES] if versions else []), *(f"{line}." for line in versions)]
    return [*lines, "", *notes, *([""] if others else []), *(f"- {line}." for line in others)]


def _is_alike(row: Row) -> bool:
    return bool(row.get("step_tokens") == row.get("expected_tokens"))


def _describe_program(row: Row, beside: Sequence[Mapping[str, float]]) -> str:
    program, _, setting = row["name"].partition(": ")
    if not is_measured(row):
        return f"| {setting} | {program} | {_find_reason(row)} ||||||||"
    if "speed" in row:
        program += f" ({', '.join(row['speed']['ways']) or 'none of the ways'})"
    ratios = [
        f"{row['tokens_per_second'] / speeds[setting]:.2f}" if setting in speeds and _is_alike(row) else ""
        for speeds in beside
    ]
    if not _is_alike(row):
        setting += f" (took {row['step_tokens']:,} tokens a step in place of {row['expected_tokens']:,})"
    share = f"{row['flops_per_second'] / row['attainable_flops']:.0%}" if "attainable_flops" in row else ""
    kernels = row.get("kernels", 0)  # on a processor none are counted
    busy, count = (f"{row['busy_seconds'] / row['seconds']:.0%}", f"{kernels:,}") if kernels else ("", "")
    flops = f"{row['flops_per_second'] / 1e12:.3g}"
    cells = [
        setting,
        program,
        f"{row['tokens_per_second']:,.0f}",
        *ratios,
        flops,
        share,
        busy,
        count,
        _gib(row["allocated"]),
    ]
    return f"| {' | '.join(cells)} |"


def describe_export(rows: Iterable[Row]) -> list[str]:
    """Return a line for the chat and for each export."""
    return [
        f"- {row['name']}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "name")
        for row in rows
    ]


def describe_parts(parts: Mapping[str, Row]) -> str:
    """Return how each part ended and when it ran; parts of another state of the kit than the last one are named."""
    newest = max(parts.values(), key=lambda part: part.get("measured", ""), default={}).get("sources")
    texts = []
    for name, part in parts.items():
        end = "ran out of time" if part["status"] is None else f"status {part['status']}"
        when = f", {part['measured']}" if "measured" in part else ""
        state = ", by another state of the kit" if part.get("sources") != newest else ""
        texts.append(f"{name} ({end} after {part['seconds']:.0f} s{when}{state})")
    return "Parts: " + "; ".join(texts)


def _find_reason(row: Row) -> str:
    if "skipped" in row:
        return f"not measured: {row['skipped']}"
    return str(row.get("error", ""))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return str(value)
