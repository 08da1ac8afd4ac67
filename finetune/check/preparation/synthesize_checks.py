"""Check the sections `endpoints` and `synthesize` of a recipe, and the endpoints and prompts that it names."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from finetune.check.data_section import find_file
from finetune.checkpoints.checkpoint_table import find_alias, is_hub_id, list_aliases
from finetune.errors import describe_unknown_name
from finetune.files.folders import expand_home
from finetune.files.resources import find_resource_folder
from finetune.recipe.preparation.clean_section import CleanSection
from finetune.recipe.preparation.synthesize_section import EndpointSection, SynthesizeSection
from finetune.rewards.rules import RULES

VARIATIONS = ("easier", "harder", "more_steps", "translated")
# Jobs that compare several answers to one prompt.
_NEEDS_SCORES = {"pairs"}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Each request under way has a thread.
_MOST_AT_ONCE = 1024


def check_endpoints(endpoints: Mapping[str, EndpointSection]) -> Iterator[str]:
    """Yield the problems of the section."""
    for name, section in endpoints.items():
        where = f"endpoints.{name}"
        if not section.model:
            yield f"{where}.model: is missing; name the server's model, or a checkpoint or a run on this machine"
        elif not section.base_url:
            yield from _check_local_model(section.model, f"{where}.model")
        if section.base_url and not _is_address(section.base_url):
            yield f"{where}.base_url: must begin with http:// or https:// and a host, such as http://localhost:8000/v1; found {section.base_url}"
        if section.concurrency > _MOST_AT_ONCE:
            yield f"{where}.concurrency: must be at most {_MOST_AT_ONCE}; found {section.concurrency}"
        if section.key_variable and not _VARIABLE.fullmatch(section.key_variable):
            yield f"{where}.key_variable: must be the name of an environment variable; a key itself belongs into no recipe"
        for key, least in (
            ("concurrency", 1),
            ("retries", 0),
            ("timeout_seconds", 0.001),
            ("prompt_price", 0),
            ("answer_price", 0),
        ):
            if getattr(section, key) < least:
                yield f"{where}.{key}: must be at least {least}; found {getattr(section, key)}"
        for key in ("max_requests", "max_tokens_total", "max_cost"):
            limit = getattr(section, key)
            if limit is not None and limit <= 0:
                yield f"{where}.{key}: must be above 0, or null for no limit; found {limit}"
        if section.max_cost is not None and not section.prompt_price + section.answer_price:
            yield f"{where}.max_cost: needs prices; set prompt_price and answer_price, for a million tokens"


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, or a port that is no port
        return False
    return is_valid and not any(letter.isspace() for letter in text)


def _check_local_model(name: str, where: str) -> Iterator[str]:
    if not (expand_home(name).is_dir() or find_alias(name) or is_hub_id(name)):
        yield f"{where}: {name!r} is {describe_unknown_name(name, list_aliases())}; a run, a folder or a hub id works too, and a server needs base_url"


def check_clean_judge(section: CleanSection, endpoints: Mapping[str, EndpointSection], folder: Path) -> Iterator[str]:
    """Yield the problems of `clean.judge`."""
    judge = section.judge
    if judge.endpoint:
        yield from _check_name(judge.endpoint, "clean.judge.endpoint", endpoints)
    if not 0 <= judge.drop_lowest < 1:
        yield f"clean.judge.drop_lowest: must be a share from 0 to below 1, such as 0.1; found {judge.drop_lowest}"
    shipped = [path.stem for path in (find_resource_folder("templates") / "judge").glob("*.jinja")]
    if judge.prompt not in shipped and find_file(judge.prompt, folder) is None:
        yield f"clean.judge.prompt: {judge.prompt!r} is {describe_unknown_name(judge.prompt, shipped)}; a .jinja file works too"
    if judge.attempts < 1 or judge.max_tokens < 1:
        yield f"clean.judge: attempts and max_tokens must be at least 1; found {judge.attempts} and {judge.max_tokens}"


def check_synthesize(section: SynthesizeSection, endpoints: Mapping[str, EndpointSection]) -> Iterator[str]:
    """Yield the problems of the section."""
    if section == SynthesizeSection():
        return
    yield from _check_name(section.endpoint, "synthesize.endpoint", endpoints)
    if section.judge:
        yield from _check_name(section.judge, "synthesize.judge", endpoints)
    for name in section.rules:
        if name not in RULES:
            yield f"synthesize.rules: {name!r} is {describe_unknown_name(name, RULES, 'no rule')}"
        elif RULES[name].needs_length and section.length_tokens is None:
            yield f"synthesize.length_tokens: is missing; the rule {name} needs it"
    scorers = [key for key in ("rules", "judge", "reward_run") if getattr(section, key)]
    if len(scorers) > 1:
        yield f"synthesize: takes one of rules, judge and reward_run; found {' and '.join(scorers)}"
    if not scorers and (section.job in _NEEDS_SCORES or section.keep == "best"):
        yield "synthesize: answers must be scored to be compared; set rules, judge or reward_run"
    if section.job in _NEEDS_SCORES and section.samples < 2:
        yield f"synthesize.samples: must be at least 2, since a pair has two answers; found {section.samples}"
    for key, least in (("samples", 1), ("temperature", 0), ("max_tokens", 1), ("attempts", 1), ("margin", 0)):
        if getattr(section, key) < least:
            yield f"synthesize.{key}: must be at least {least}; found {getattr(section, key)}"
    for name in section.variations:
        if name not in VARIATIONS:
            yield f"synthesize.variations: {name!r} is {describe_unknown_name(name, VARIATIONS)}"
    if section.job == "variations" and not section.variations:
        yield f"synthesize.variations: is missing; name at least one of {', '.join(VARIATIONS)}"


def _check_name(name: str, where: str, endpoints: Mapping[str, EndpointSection]) -> Iterator[str]:
    if name not in endpoints:
        known = describe_unknown_name(name, endpoints) if endpoints else "unknown; the section endpoints is empty"
        yield f"{where}: {name!r} is {known}; describe it in the recipe, such as endpoints: {{teacher: {{model: nano}}}}"


def settle_endpoints(endpoints: Mapping[str, EndpointSection]) -> dict[str, EndpointSection]:
    """Return the section with absolute paths of the models on this machine; an alias wins over a folder of its name."""
    return {
        name: replace(section, model=str(expand_home(section.model).resolve()))
        if not section.base_url and find_alias(section.model) is None and expand_home(section.model).is_dir()
        else section
        for name, section in endpoints.items()
    }


def settle_synthesize(section: SynthesizeSection) -> SynthesizeSection:
    """Return the section with absolute paths."""
    return (
        replace(section, reward_run=str(expand_home(section.reward_run).resolve())) if section.reward_run else section
    )
