"""A checked recipe together with what its names stand for."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.checkpoints.checkpoint_table import Checkpoint
from finetune.recipe.methods import METHODS, Method
from finetune.recipe.sections import Recipe
from finetune.recipe.trl_options import read_trainer_options
from finetune.runs.results import Result


@dataclass(frozen=True)
class ResolvedRecipe:
    """A checked recipe with absolute paths, and what its names stand for.

    `checkpoint` is the row of the table that `model.checkpoint` names, or None for a hub id, a folder or a run. `earlier` is the
    result of the run that it continues. `given` holds the keys that the recipe or the command line sets. `awaits_adapter` marks a
    stage of a chain that will continue the adapter of the stage before, which is not trained yet.
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
    def title(self) -> str:
        """Method and base checkpoint, for the title of a plot."""
        return f"{self.recipe.method} from {Path(self.recipe.model.checkpoint).name}"

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter that training continues, if there is one."""
        return self.earlier.folder if self.earlier is not None and self.earlier.is_adapter else None

    @property
    def adapter_starts_empty(self) -> bool:
        """Whether the adapter changes nothing before step 1, so that the base model serves as the reference model."""
        continues = self.awaits_adapter or self.adapter_folder is not None
        return self.recipe.adapter.beginning.starts_empty and not continues

    @property
    def trains_all_weights(self) -> bool:
        """Whether every weight is trained, without an adapter."""
        return self.recipe.adapter.trains_all_weights

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        return bool(self.recipe.data.eval or self.recipe.data.held_out)

    @property
    def uses_cpu(self) -> bool:
        """Whether the recipe asks for the CPU, even where there is a GPU."""
        return bool(self.recipe.trainer.get("use_cpu"))

    def read_option(self, name: str) -> Any:
        """Return an option of the section trainer, or its default in the method's configuration class."""
        if name in self.recipe.trainer:
            return self.recipe.trainer[name]
        return read_trainer_options(self.method.config_module, self.method.config_class)[name].default

    def change(self, **values: Any) -> "ResolvedRecipe":
        """Return a copy with other values of the recipe's sections; what the names stand for is not looked up again."""
        recipe = replace(self.recipe, **values)
        return replace(self, recipe=recipe, method=METHODS[recipe.method])

    def change_trainer(self, **options: Any) -> "ResolvedRecipe":
        """Return a copy with some options of the section trainer set."""
        return self.change(trainer={**self.recipe.trainer, **options})
