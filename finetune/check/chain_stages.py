"""What a chain is: stages that train or export, one after the other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.recipe.sections import Recipe, to_plain

Content = dict[str, Any]


@dataclass(frozen=True)
class ExportSection:
    """How a chain's export is written: the options of `finetune export`, by their names."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_shard_size: str = "2GB"
    base: Literal["full", "dequantized", "auto"] = "full"
    verify: bool = True


@dataclass(frozen=True)
class TrainStage:
    """A stage that trains. `recipe` is complete but for its start, which is the run before, if there is one (`follows`)."""

    name: str
    recipe: Recipe
    follows: Path | None
    goes_on: bool = False  # with the adapter of the run before

    @property
    def run_recipe(self) -> Recipe:
        """The recipe with the run before as its start, which is there once that has finished."""
        if self.follows is None:
            return self.recipe
        return replace(self.recipe, model=replace(self.recipe.model, checkpoint=str(self.follows)))


@dataclass(frozen=True)
class ExportStage:
    """A stage that exports the newest run before it into a folder of its name."""

    name: str
    settings: ExportSection
    run: Path
    output: Path


Stage = TrainStage | ExportStage


@dataclass(frozen=True)
class Chain:
    """Stages in their order, and the one folder that all of them leave their results in."""

    source: Path
    output: Path
    stages: tuple[Stage, ...]

    @property
    def trainings(self) -> list[TrainStage]:
        """The stages that train."""
        return [stage for stage in self.stages if isinstance(stage, TrainStage)]


def to_plain_chain(chain: Chain) -> Content:
    """Return a chain as dicts, lists and scalars, every stage written out in full; reading it gives the same chain."""
    stages: list[Content] = []
    for stage in chain.stages:
        if isinstance(stage, ExportStage):
            stages.append({"name": stage.name, "export": dict(vars(stage.settings))})
            continue
        recipe = to_plain(stage.recipe)
        recipe.pop("output")
        if stage.follows is not None:
            recipe["model"].pop("checkpoint")
        stages.append({"name": stage.name, **recipe})
    return {"output": str(chain.output), "stages": stages}


def dump_chain(chain: Chain) -> str:
    """Return a chain as YAML; see `to_plain_chain`."""
    return yaml.safe_dump(to_plain_chain(chain), sort_keys=False, allow_unicode=True, width=100)
