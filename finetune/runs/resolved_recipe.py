"""A checked recipe together with everything that it names, looked up once."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.checkpoints.checkpoint_table import Checkpoint, find_alias
from finetune.recipe.methods import METHODS, Method
from finetune.recipe.sections import Recipe
from finetune.runs.results import Result


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe without problems, with absolute paths, and what its names stand for.

    `checkpoint` is the row of the table that `model.checkpoint` names, or None for a hub id, a folder or a run. `earlier` is
    the result of the run that it continues. `given` holds the keys that the recipe or the command line sets itself.
    `awaits_adapter` marks a later stage of a chain: it will continue the adapter of the stage before, which is not there yet.
    """

    recipe: Recipe
    method: Method
    checkpoint: Checkpoint | None = None
    earlier: Result | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)
    awaits_adapter: bool = False

    @property
    def output(self) -> Path:
        """The run directory."""
        return Path(self.recipe.output)

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter that training continues, if there is one."""
        return self.earlier.folder if self.earlier is not None and self.earlier.is_adapter else None

    @property
    def adapter_starts_empty(self) -> bool:
        """Whether the adapter changes nothing before step 1, so that the base alone is the reference model."""
        continues = self.awaits_adapter or self.adapter_folder is not None
        return self.recipe.adapter.init == "default" and not continues

    @property
    def trains_all_weights(self) -> bool:
        """Whether there is no adapter, and every weight is trained."""
        return self.recipe.adapter.trains_all_weights

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        return bool(self.recipe.data.eval or self.recipe.data.held_out)

    @property
    def uses_cpu(self) -> bool:
        """Whether the recipe asks for the CPU where there is a GPU."""
        return bool(self.recipe.trainer.get("use_cpu"))

    def change(self, **values: Any) -> "ResolvedRecipe":
        """Return it with other values of the recipe's sections; what the names stand for stays as it is."""
        recipe = replace(self.recipe, **values)
        return replace(self, recipe=recipe, method=METHODS[recipe.method])

    def change_trainer(self, **options: Any) -> "ResolvedRecipe":
        """Return it with some options of the section trainer set."""
        return self.change(trainer={**self.recipe.trainer, **options})


def resolve_names(recipe: Recipe, earlier: Result | None = None, given: frozenset[str] = frozenset()) -> ResolvedRecipe:
    """Return a checked recipe with its method and the row of its base checkpoint."""
    checkpoint = find_alias(recipe.model.checkpoint)
    return ResolvedRecipe(recipe, METHODS[recipe.method], checkpoint, earlier, given)
