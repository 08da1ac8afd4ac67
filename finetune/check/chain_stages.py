"""The data classes of a chain: stages that train or export, one after the other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.recipe.sections import Recipe, dump_plain, to_plain
from finetune.runs.export_settings import ExportSettings
from finetune.runs.resolved_recipe import ResolvedRecipe

Content = dict[str, Any]


@dataclass(frozen=True)
class TrainStage:
    """A stage that trains; `follows` is the run directory that it continues from, which may not exist yet.

    `recipe` names the base checkpoint of the first stage, so that plans and previews work before any stage has run. `rows` is the
    file of the stage before, where that one synthesizes; in `recipe`, bundled pairs stand for it.
    """

    name: str
    resolved: ResolvedRecipe
    follows: Path | None
    rows: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the stage, with the keys that it inherits."""
        return self.resolved.recipe

    @property
    def run_recipe(self) -> Recipe:
        """The recipe for running the stage: its `model.checkpoint` is the run directory that it continues from."""
        if self.follows is None:
            return self.recipe
        data = self.recipe.data if self.rows is None else replace(self.recipe.data, train=(str(self.rows),))
        return replace(self.recipe, model=replace(self.recipe.model, checkpoint=str(self.follows)), data=data)


@dataclass(frozen=True)
class ExportStage:
    """A stage that exports the newest run before it into a folder named after the stage."""

    name: str
    settings: ExportSettings
    run: Path
    output: Path


# The name of the endpoint that stands for the newest run before a stage.
RUN_ENDPOINT = "run"


@dataclass(frozen=True)
class SynthesizeStage:
    """A stage that lets the newest run before it write rows into a folder named after the stage.

    In `resolved`, the base checkpoint of the first stage stands for that run, which may not exist yet.
    """

    name: str
    resolved: ResolvedRecipe
    run: Path
    output: Path

    @property
    def run_resolved(self) -> ResolvedRecipe:
        """The recipe for running the stage: the endpoint `run` is the run before."""
        endpoints = dict(self.resolved.recipe.endpoints)
        endpoints[RUN_ENDPOINT] = replace(endpoints[RUN_ENDPOINT], model=str(self.run))
        return self.resolved.change(endpoints=endpoints)


Stage = TrainStage | ExportStage | SynthesizeStage


@dataclass(frozen=True)
class Chain:
    """The stages in their order, and the folder that holds their results.

    A recipe without `stages:` is a chain of one stage without a name; its run directory is `output`.
    """

    source: Path
    output: Path
    stages: tuple[Stage, ...]

    @property
    def trainings(self) -> list[TrainStage]:
        """The stages that train."""
        return [stage for stage in self.stages if isinstance(stage, TrainStage)]

    @property
    def single(self) -> TrainStage | None:
        """The stage of a recipe without `stages:`, or None for a real chain."""
        first = self.stages[0]
        return first if isinstance(first, TrainStage) and not first.name else None


def to_plain_chain(chain: Chain) -> Content:
    """Return a chain as dicts, lists and scalars, with every key of every stage; reading it gives the same chain."""
    if chain.single is not None:
        return to_plain(chain.single.recipe)
    stages: list[Content] = []
    for stage in chain.stages:
        if isinstance(stage, ExportStage):
            stages.append({"name": stage.name, "export": dict(vars(stage.settings))})
            continue
        if isinstance(stage, SynthesizeStage):
            stages.append({"name": stage.name, **_list_synthesis(stage)})
            continue
        recipe = to_plain(stage.recipe)
        recipe.pop("output")
        if stage.rows is not None:
            recipe["data"].pop("train")
        if stage.follows is not None:
            recipe["model"].pop("checkpoint")
        stages.append({"name": stage.name, **recipe})
    return {"output": str(chain.output), "stages": stages}


def _list_synthesis(stage: SynthesizeStage) -> Content:
    recipe = to_plain(stage.resolved.recipe)
    recipe["endpoints"] = {name: own for name, own in recipe["endpoints"].items() if name != RUN_ENDPOINT}
    return {key: recipe[key] for key in ("data", "synthesize", "endpoints", "seed")}


def dump_chain(chain: Chain) -> str:
    """Return a chain as YAML; see `to_plain_chain`."""
    return dump_plain(to_plain_chain(chain))
