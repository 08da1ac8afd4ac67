"""The data mixtures that the authors published: how many tokens of each data set each pre-training phase used.

Source: RUC-GSAI/YuLan-Mini, pretrain/datasets; the files in `recipes/mixtures` name the commit.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from finetune.errors import find_close_match
from finetune.files.resources import find_resource_folder
from finetune.mixtures.categories import CATEGORIES, find_category

_FOLDER = find_resource_folder("recipes") / "mixtures"
FIRST_PHASE, LAST_PHASE = 1, 27
# For phase 26 the authors published two mixtures: this one with short rows, and the one before phase 27 and the final model.
_SHORT_ANNEALING = "phase26-4k"


@dataclass(frozen=True)
class Mixture:
    """The mixture of one phase: `tokens` in billions for each data set, and `total`, their sum as the authors give it."""

    name: str
    phase: int
    context: str
    total: float
    tokens: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """The share of every data set, largest first; they add up to 1."""
        whole = sum(self.tokens.values())
        return {name: count / whole for name, count in sorted(self.tokens.items(), key=lambda pair: -pair[1])}

    @property
    def categories(self) -> dict[str, float]:
        """The share of every category; they add up to 1."""
        found = dict.fromkeys(CATEGORIES, 0.0)
        for name, share in self.shares.items():
            found[find_category(name)] += share
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the shares instead of the tokens."""
        plain = {key: value for key, value in asdict(self).items() if key != "tokens"}
        return {**plain, "categories": self.categories, "shares": self.shares}


@cache
def list_mixtures() -> tuple[Mixture, ...]:
    """Return the published mixtures in the order of training; phase 26 has two."""
    content = json.loads((_FOLDER / "curriculum.json").read_text(encoding="utf-8"))
    return tuple(
        Mixture(
            _SHORT_ANNEALING if (part["phase"], part["context"]) == (26, "4K") else f"phase{part['phase']}",
            part["phase"],
            part["context"],
            part["total"],
            part["tokens"],
        )
        for part in content["phases"]
    )


def list_used_datasets() -> list[dict[str, str]]:
    """Return the open data sets that the authors list, as `name` and `url`; the names may differ from those in the mixtures."""
    file = _FOLDER / "used_datasets.json"
    datasets: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))["datasets"]
    return datasets


def find_mixture(name: str) -> Mixture | None:
    """Return the mixture that a recipe names, such as `phase26`, or None."""
    return next((mixture for mixture in list_mixtures() if mixture.name == name), None)


def describe_unknown_mixture(name: str) -> str:
    """Return a text that says that a mixture is unknown, with the closest known name."""
    match = find_close_match(name, [mixture.name for mixture in list_mixtures()])
    return f"unknown; {f'did you mean {match!r}? Known are' if match else 'known are'} phase{FIRST_PHASE} to phase{LAST_PHASE} and {_SHORT_ANNEALING}"


def choose_mixtures(phase: int | None) -> list[Mixture]:
    """Return the mixtures of a phase, or all mixtures for None."""
    return [mixture for mixture in list_mixtures() if phase in (None, mixture.phase)]


def describe_mixtures(mixtures: list[Mixture]) -> str:
    """Return a table with the shares of the categories in percent, one line for each mixture."""
    widths = {name: max(len(name), 6) for name in CATEGORIES}
    lines = ["mixture     context  tokens  " + "  ".join(f"{name:>{width}}" for name, width in widths.items())]
    for mixture in mixtures:
        shares = "  ".join(f"{mixture.categories[name]:>{width}.1%}" for name, width in widths.items())
        lines.append(f"{mixture.name:<11} {mixture.context:>7}  {mixture.total:>5.1f}B  {shares}")
    lines += ["", *(f"{name:<12}  {text}" for name, text in CATEGORIES.items())]
    lines += [
        "",
        "The authors published the shares by data set; this kit groups them. --phase N shows one phase with its data sets, "
        "--datasets the addresses of the open ones.",
    ]
    return "\n".join(lines)


def describe_datasets(mixture: Mixture) -> str:
    """Return a table of a mixture's data sets by category, largest first, with their shares and tokens."""
    lines = [
        f"{mixture.name}: {mixture.total:.1f} billion tokens, {mixture.context} context, {len(mixture.tokens)} data sets"
    ]
    for category, whole in sorted(mixture.categories.items(), key=lambda pair: -pair[1]):
        if whole:
            lines += ["", f"{category}  {whole:.1%}  ({CATEGORIES[category]})"]
            members = [(name, share) for name, share in mixture.shares.items() if find_category(name) == category]
            lines += [f"  {share:>7.2%}  {mixture.tokens[name] * 1000:>8,.0f}M  {name}" for name, share in members]
    return "\n".join(lines)
