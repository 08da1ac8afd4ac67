"""Patches and private names of libraries stand in `finetune/compat.py` alone, and still mean what they meant."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from finetune import compat

PACKAGE = Path(compat.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "compat.py")
# Each private or patched name of a library, by the function that uses it.
NAMES = {
    "load_trainer_class": [],
    "narrow_logit_tiles": ["trl.trainer.utils:_CHUNKED_LOGPROB_CHUNK_SIZE"],
    "skip_row_preparation": [
        "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset",
        "trl.trainer.kto_trainer:KTOTrainer._prepare_dataset",
    ],
    "copy_rows": ["datasets:Dataset"],
    "read_cache_only": ["datasets:config.HF_HUB_OFFLINE"],
    "replace_chat_template": ["transformers:PreTrainedTokenizerBase.apply_chat_template"],
    "replace_offloading": [],
    "run_losses_in_place": [
        "trl.kernels.chunked_logprob:_forward_tile",
        "trl.kernels.chunked_logprob:_backward_tile",
        "trl.kernels.chunked_logprob:_addmm_fp32",
        "trl.trainer.utils:_use_triton",
    ],
    "take_reference_as_known": [
        "trl.trainer.dpo_trainer:hash_module",
        "trl.trainer.dpo_trainer:DPOTrainer._precompute_ref_logps",
        "trl.trainer.kto_trainer:hash_module",
        "trl.trainer.kto_trainer:KTOTrainer._precompute_ref_logps",
    ],
    "make_without_weights": ["transformers:PreTrainedModel._from_config"],
    "name_attention": ["transformers:PreTrainedConfig._attn_implementation"],
    "build_masks_as_in_run": ["transformers.masking_utils:is_tracing"],
    "use_one_gpu": ["transformers:TrainingArguments.n_gpu"],
    "watch_numbers": ["transformers:Trainer.training_step", "accelerate:Accelerator.clip_grad_norm_"],
    "skip_steps": ["transformers:Trainer._run_epoch"],
    "count_tokens": [],
    "complete_head": ["peft.utils.other:TrainableTokensWrapper"],
    "leave_adapters_in_place": ["peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer"],
    "answer_autocast_as_gpu": ["torch:is_autocast_enabled"],
    "keep_weights_differentiable": ["bitsandbytes.nn:Linear4bit.forward"],
    "replace_loading": ["bitsandbytes.optim:AdamW8bit.load_state_dict"],
    "shard_on_cpu": ["accelerate.state:PartialState._shared_state", "accelerate.state:AcceleratorState"],
    "wrap_backward": ["accelerate:Accelerator.backward"],
    "load_fake_tensors": ["torch._subclasses.fake_tensor:FakeTensor", "torch._subclasses.fake_tensor:FakeTensorMode"],
    "load_dispatch_mode": ["torch.utils._python_dispatch:TorchDispatchMode._should_skip_dynamo"],
    "load_operations": [
        "torch.ops:aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        "torch.ops:aten._local_scalar_dense.default",
        "torch.ops:aten._unsafe_view.default",
    ],
    "leave_all_modes": ["torch.utils._python_dispatch:_disable_current_modes"],
    "identify_storage": ["torch:UntypedStorage._cdata"],
    "copy_each": ["torch:_foreach_copy_"],
    "find_share": ["torch.distributed.tensor._utils:compute_local_shape_and_global_offset"],
    "keep_in_place": ["torch.nn:Module.to"],
    "keep_gradients": ["torch.nn:Module.zero_grad"],
}
# The tests that fail when a patch no longer does what it should.
NOTICED_BY = {
    "load_trainer_class": "test_compat.py::test_a_run_is_not_told_that_trl_calls_a_trainer_experimental",
    "narrow_logit_tiles": "planning/step/test_preference_steps.py::test_dpo_holds_no_logits_whole",
    "skip_row_preparation": "training/preference/test_preference.py",
    "copy_rows": "training/preference/test_preference.py",
    "read_cache_only": "hub/test_hub_faults.py::test_a_data_set_of_a_hub_that_is_away_costs_the_tries_of_the_kit_only",
    "replace_chat_template": "training/test_online.py",
    "replace_offloading": "planning/step/test_step_memory.py",
    "run_losses_in_place": "planning/step/test_preference_steps.py::test_dpo_holds_no_logits_whole",
    "take_reference_as_known": "planning/step/test_preference_steps.py::test_prediction_matches_a_real_run",
    "make_without_weights": "planning/step/test_step_memory.py",
    "name_attention": "yulan/native/test_modeling.py",
    "build_masks_as_in_run": "planning/step/test_step_memory.py::test_prediction_matches_a_real_run",
    "use_one_gpu": "training/test_processes.py::test_two_visible_gpus_train_as_one_does",
    "watch_numbers": "training/test_numbers.py::test_a_gradient_that_is_no_number_stops_the_run_before_it_changes_the_weights",
    "skip_steps": "training/test_resuming.py::test_a_run_whose_last_checkpoint_holds_the_last_step_trains_no_step_more",
    "count_tokens": "training/test_resuming.py::test_tokens_are_counted_on",
    "complete_head": "training/test_run.py",
    "leave_adapters_in_place": "planning/step/test_step_memory.py",
    "answer_autocast_as_gpu": "test_compat.py::test_layers_that_ask_for_cuda_see_the_autocast_of_a_dry_run",
    "keep_weights_differentiable": "training/test_run.py",
    "replace_loading": "training/pretraining/test_optimizer.py",
    "shard_on_cpu": "models/test_engine.py",
    "wrap_backward": "planning/step/test_step_memory.py::test_prediction_matches_a_real_run",
    "load_fake_tensors": "planning/step/test_tracker.py",
    "load_dispatch_mode": "test_compat.py::test_torch_calls_a_mode_without_a_guard",
    "load_operations": "planning/step/test_step_memory.py::test_prediction_matches_a_real_run",
    "leave_all_modes": "planning/step/test_step_memory.py",
    "identify_storage": "planning/step/test_tracker.py",
    "copy_each": "training/speed/test_speed_trial.py::test_copies_train_the_same_run_to_the_bit",
    "find_share": "training/pretraining/test_annealing.py",
    "keep_in_place": "planning/step/test_step_memory.py",
    "keep_gradients": "planning/step/test_step_memory.py::test_prediction_matches_a_real_run",
}


def test_every_entry_is_listed_with_its_test():
    generic = {"replace_attribute", "do_nothing"}
    functions = {name for name, found in vars(compat).items() if inspect.isfunction(found) and name[0] != "_"}
    own = {name for name in functions if getattr(compat, name).__module__ == compat.__name__}
    assert own - generic == set(NAMES) == set(NOTICED_BY)
    for place in NOTICED_BY.values():
        file, _, test = place.partition("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"def {test}" in text
    for name in own:
        assert getattr(compat, name).__doc__


@pytest.mark.parametrize("place", [place for places in NAMES.values() for place in places])
def test_the_names_are_there(place):
    module, _, path = place.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{place} is gone; look at finetune/compat.py"
        found = getattr(found, name)


def test_a_run_is_not_told_that_trl_calls_a_trainer_experimental():
    """The trainer's configuration is made first, so this import must be silent too."""
    imported = "getattr(importlib.import_module(module), name)"
    for load, is_silent in (("load_trainer_class(module, name)", True), (imported, False)):
        code = (
            "import importlib, warnings\n"
            "from finetune.compat import load_trainer_class\n"
            "from finetune.recipe.methods import METHODS\n"
            "module, name = METHODS['orpo'].config_module, METHODS['orpo'].config_class\n"
            "with warnings.catch_warnings(record=True) as told:\n"
            "    warnings.simplefilter('always')\n"
            f"    {load}\n"
            "print(any('trl.experimental' in str(warning.message) for warning in told))\n"
        )
        clean = {name: value for name, value in os.environ.items() if name != "TRL_EXPERIMENTAL_SILENCE"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
        assert done.stdout.splitlines()[-1] == str(not is_silent)


def test_an_attribute_is_replaced_for_a_while():
    owner = types.SimpleNamespace(name="before")
    with compat.replace_attribute(owner, "name", "within"):
        assert owner.name == "within"
    assert owner.name == "before"
    with pytest.raises(AttributeError), compat.replace_attribute(owner, "absent", 1):
        pass

    child = type("Child", (Path,), {})
    with compat.replace_attribute(child, "exists", lambda: "within"):
        assert child.exists() == "within"
    assert "exists" not in vars(child)  # it is inherited again


def test_rows_keep_their_order_without_a_copy():
    rows = Dataset.from_dict({"number": list(range(8))}).shuffle(seed=1)

    class Rows(Dataset):
        """Another class of the same rows."""

    copied = compat.copy_rows(Rows, rows)
    assert isinstance(copied, Rows) and copied["number"][:] == rows["number"][:] != list(range(8))


def test_torch_calls_a_mode_without_a_guard():
    """Else torch wraps the method that a mode is called by, when the class is made."""
    TorchDispatchMode = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode

    def count(self, operation, types, arguments=(), options=None):
        return operation(*arguments, **(options or {}))

    ours = type("Ours", (compat.load_dispatch_mode(),), {"__torch_dispatch__": count})
    theirs = type("Theirs", (TorchDispatchMode,), {"__torch_dispatch__": count})
    assert ours.__torch_dispatch__ is count
    assert theirs.__torch_dispatch__ is not count


def test_views_share_a_storage():
    tensor = torch.zeros(4)
    number, view, other = (
        compat.identify_storage(part.untyped_storage()) for part in (tensor, tensor[1:], torch.zeros(4))
    )
    assert number == view != other


def list_foreign_names(tree):
    """Return the names that a module binds by importing something that is not ours."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("finetune"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def find_root(node):
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


# Python documents each: a way to end at once, and a hook and a stream that are there to be set.
DOCUMENTED = ("os._exit", "sys.unraisablehook", "sys.stderr")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def list_patches(tree):
    """Yield what belongs into compat.py: private names of others, and functions put in the place of others."""
    foreign = list_foreign_names(tree)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            names = [*str(module).split("."), *(part for alias in node.names for part in alias.name.split("."))]
            yield from (name for name in names if is_private(name) or name == "mock")
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if not is_own(node.value) and ast.unparse(node) not in DOCUMENTED:
                yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and find_root(node) in foreign:
            if ast.unparse(node) not in DOCUMENTED:
                yield ast.unparse(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            value = node.value
            is_function = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)
            if is_function and not is_own(node.targets[0].value):
                yield ast.unparse(node.targets[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "replace_attribute":
            yield from (ast.unparse(owner) for owner in node.args[:1] if find_root(owner) in foreign)


def is_own(node):
    """Tell whether an expression is the object itself; `super()` counts, as a class may extend what it inherits."""
    return ast.unparse(node) in ("self", "cls", "super()")


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses import fake_tensor",
        "import torch._subclasses.fake_tensor",
        "from trl.trainer.utils import _use_triton",
        "from unittest import mock",
        "rows._indices",
        "tensor.untyped_storage()._cdata",
        "from trl.trainer import utils\nutils.SIZE = 1",
        "model.to = lambda *arguments: model",
        "def load(content): pass\noptimizer.load_state_dict = load",
        "from transformers import masking_utils\nreplace_attribute(masking_utils, 'is_tracing', answer)",
    ],
)
def test_a_patch_is_found(source):
    assert list(list_patches(ast.parse(source)))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_patches_a_library_or_uses_its_private_names(path):
    assert list(list_patches(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_layers_that_ask_for_cuda_see_the_autocast_of_a_dry_run():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.is_autocast_enabled()
        with compat.answer_autocast_as_gpu():
            assert torch.is_autocast_enabled()
            assert not torch.is_autocast_enabled("cuda")
    with compat.answer_autocast_as_gpu():
        assert not torch.is_autocast_enabled()
