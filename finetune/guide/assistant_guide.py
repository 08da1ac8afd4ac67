"""Render AGENTS.md: what a coding assistant must know to write recipes and to call the commands."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from finetune.data.formats.row_formats import FORMATS, SHAPES
from finetune.guide.recipe_keys import (
    list_endpoint_keys,
    list_export_keys,
    list_recipe_keys,
    list_source_keys,
    list_task_keys,
    walk_keys,
)
from finetune.guide.shipped_recipes import list_shipped_recipes
from finetune.recipe.methods import METHODS

_HEAD = """# For coding assistants

`finetune recipes --agents` makes this page from the kit's own tables. `finetune` fine-tunes YuLan-Mini, a 2.4 B-parameter model
with the architecture of Llama, from any of its published checkpoints.

- A recipe is one YAML file. Write it, then run `finetune check RECIPE`: it names every unknown, misspelt or wrongly typed key at
  once and loads nothing. Do not invent keys: those below are all there are, and `trainer` also takes the options of the method's
  TRL configuration class.
- `finetune preview RECIPE` shows which tokens are trained, `finetune plan RECIPE --memory 8GB` whether it fits, and
  `finetune train RECIPE -s trainer.max_steps=2 -s output=runs/try` whether it runs. `-s section.key=value` overrides one key.
- For a trial without a GPU or a network set `model.checkpoint: nano` and `trainer.use_cpu: true`.
- Every command takes `--json` and then prints one JSON object. Exit status: 0 done, 2 something to mend (one message says what),
  1 a fault of the kit, 130 interrupted.
- Never set two keys for one thing. The length of rows is `data.max_tokens`, weights and precision are in `model`, LoRA is in
  `adapter`; the same options under `trainer` are refused.
"""
_RECIPE = """## A whole recipe

```yaml
method: sft
model: {checkpoint: base, quantize: nf4}
data: {train: my.jsonl, held_out: 0.05, max_tokens: 2048, overflow: drop}
adapter: {rank: 16, alpha: 32, train_tokens: [104, 105, 106]}
trainer:
  num_train_epochs: 2
  learning_rate: 2e-4
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 16
output: runs/my
```
"""


class ShownVerb(Protocol):
    """What the page shows of a verb."""

    @property
    def name(self) -> str:
        """The verb."""

    @property
    def help(self) -> str:
        """What it does."""

    @property
    def examples(self) -> tuple[str, ...]:
        """Whole command lines."""


def render_assistant_guide(verbs: Iterable[ShownVerb]) -> str:
    """Return the whole page in Markdown."""
    return "\n".join(_list_parts(verbs))


def _list_parts(verbs: Iterable[ShownVerb]) -> Iterator[str]:
    yield _HEAD
    yield _RECIPE
    yield "## Commands\n"
    for verb in verbs:
        yield f"- `{verb.name}`: {verb.help}. {', '.join(f'`{example}`' for example in verb.examples)}"
    yield "\n## Shipped recipes\n"
    for recipe in list_shipped_recipes():
        yield f"- `{recipe.name}`: {recipe.method}; trains {recipe.trains}; needs {recipe.needs}"
    yield "\n## Rows\n\nOne JSON object on each line. `data.format: auto` takes the first format whose keys the first row has.\n"
    for entry in FORMATS.values():
        methods = [name for name, method in METHODS.items() if entry.row_kind in SHAPES[method.shape]]
        yield f"- `{entry.name}`: {', '.join(f'`{key}`' for key in entry.required)} (for {', '.join(methods)})"
    yield "\n## Keys\n\n`source.` stands for an entry of data.train as a mapping, `task.` for one of data.tasks, `endpoint.` for one of endpoints, `export.` for a stage of a chain that exports.\n"
    for key in (
        *list_recipe_keys(),
        *list_source_keys(),
        *list_task_keys(),
        *list_endpoint_keys(),
        *list_export_keys(),
    ):
        for own in walk_keys((key,)):
            if not own.inner:
                default = f", default `{own.default}`" if own.default else ""
                yield f"- `{own.name}` ({', '.join(own.values)}{default}): {own.text}"
    yield ""
