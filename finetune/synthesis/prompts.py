"""Make prompts of files in `templates/`, in which the texts of rows stand as data, and read the JSON that comes back."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from finetune.errors import TemplateError, describe_unknown_name
from finetune.files.resources import find_resource_folder

_OPENING = re.compile(r"[\[{]")
_FEWEST_SCORE, _HIGHEST_SCORE = 1, 5
SCORES = ("instruction", "informativeness", "truthfulness")


class Prompt:
    """A prompt template: a name in a folder of `templates/`, or a file of the user's."""

    def __init__(self, folder: str, name: str) -> None:
        file = find_prompt(folder, name)
        try:
            self._template = SandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(
                file.read_text(encoding="utf-8")
            )
        except (OSError, ValueError, jinja2.TemplateError) as error:
            raise TemplateError(f"{file}: cannot be used as a prompt: {error}") from error
        self._name = str(file)

    def render(self, **data: Any) -> str:
        """Return the prompt. The tags around the data hold a hash of it, so that no text in it can close them.

        Raises:
            TemplateError: the template uses a name that it does not get.
        """
        mark = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
        try:
            return self._template.render(open=f"<data-{mark}>", close=f"</data-{mark}>", **data)
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"{self._name}: cannot be rendered: {error}; it gets open, close, {', '.join(data)}"
            ) from error


def list_prompts(folder: str) -> dict[str, Path]:
    """Return the shipped prompts of a folder of `templates/`: name -> file."""
    return {path.stem: path for path in sorted((find_resource_folder("templates") / folder).glob("*.jinja"))}


def find_prompt(folder: str, name: str) -> Path:
    """Return the file of a shipped prompt, or a file of the user's.

    Raises:
        TemplateError: there is none.
    """
    shipped = list_prompts(folder)
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise TemplateError(f"the prompt {name!r} is {describe_unknown_name(name, shipped)}; a .jinja file works too")


def list_json(text: str) -> Iterator[Any]:
    """Yield every JSON list or object in an answer, the outer ones only."""
    decoder, start = json.JSONDecoder(), 0
    while opening := _OPENING.search(text, start):
        try:
            value, start = decoder.raw_decode(text, opening.start())
            yield value
        except ValueError:
            start = opening.end()
        except RecursionError:
            return  # each opening of the nest would be tried, for minutes; no answer that was asked for is nested like this


def read_scores(text: str) -> dict[str, float] | None:
    """Return the three scores of a judge's answer, or None where it does not hold all of them; the last object counts."""
    found = None
    for value in list_json(text):
        if isinstance(value, dict) and all(_is_score(value.get(name)) for name in SCORES):
            found = {name: float(value[name]) for name in SCORES}
    return found


def _is_score(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and _FEWEST_SCORE <= value <= _HIGHEST_SCORE
