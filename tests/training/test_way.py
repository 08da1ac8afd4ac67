"""The way of a recipe into a training run is short: a reader follows it through few modules."""

import sys

import pytest

from finetune.check.chain_stages import Chain, TrainStage
from finetune.cli.main import main
from finetune.files.resources import find_demo_data
from finetune.recipe.recipe_file import Draft
from finetune.recipe.sections import Recipe
from finetune.runs.resolved_recipe import ResolvedRecipe
from finetune.training.setup import Setup

CARRIERS = (Draft, Recipe, ResolvedRecipe, TrainStage, Chain, Setup)
MOST_STAYS = 12


class Walk:
    """Notes, one after the other, the modules whose functions are handed a recipe until the trainer is built."""

    def __init__(self):
        self.stays, self.is_done = [], False

    def __call__(self, frame, event, _):
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if self.is_done or not module.startswith("finetune."):
            return
        if event == "return" and code.co_name == "build_trainer":
            self.is_done = True
        elif event == "call" and self._enters(frame) and self.stays[-1:] != [module]:
            self.stays.append(module)

    def _enters(self, frame):
        """Tell whether a function of a module is handed a recipe; its own methods are no stay elsewhere."""
        if frame.f_code.co_name.startswith(("<", "__")):
            return False
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        if names[:1] == ("self",) and isinstance(frame.f_locals["self"], CARRIERS):
            return False
        return frame.f_code.co_name == "run_train" or any(isinstance(frame.f_locals[n], CARRIERS) for n in names)


def test_a_recipe_stays_in_few_modules(tmp_path, nano_llama):
    settings = ["model.checkpoint=nano", f"data.train={find_demo_data('demo.jsonl')}", "data.max_tokens=256"]
    settings += ["trainer.max_steps=1", "answers=0", f"output={tmp_path / 'run'}"]
    walk, before = Walk(), sys.getprofile()
    sys.setprofile(walk)
    try:
        with pytest.raises(SystemExit):
            main(["train", "sft_lora", *(word for setting in settings for word in ("-s", setting))])
    finally:
        sys.setprofile(before)
    assert walk.is_done
    assert len(walk.stays) <= MOST_STAYS, "\n".join(walk.stays)
