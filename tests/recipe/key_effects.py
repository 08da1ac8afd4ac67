"""What a key of a recipe can change: the rows, the model, the trainer, the answers' rewards, the run, the export. Each is observed in process."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from transformers import set_seed

from finetune.check.chains import load_chain
from finetune.data.encoding.template import find_template
from finetune.errors import FinetuneError
from finetune.evaluation.tasks.task_results import TaskResult
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.cache import find_cache
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter
from finetune.models.precision import choose_precision
from finetune.planning.automatic import choose_settings
from finetune.planning.forecast import Plan, choose_target
from finetune.recipe.sections import dump_recipe
from finetune.rewards.judge import borrow_base
from finetune.rewards.reward_functions import AnswerRewards, list_weights
from finetune.runs.export_settings import ExportSettings
from finetune.runs.lineage import find_training_base
from finetune.runs.results import open_result
from finetune.runs.trained_tokens import open_tokenizer
from finetune.training.observing.task_scores import TaskScores, plan_tasks
from finetune.training.run import run_training
from finetune.training.setup import build_model, prepare
from finetune.training.trainer import MethodInputs, build_trainer, make_config
from finetune.training.training_rows import prepare_rows

CPU = torch.device("cpu")


def observe_rows(resolved):
    """Return the tokens and labels of all rows, or the message that refuses them."""
    try:
        _, splits = prepare_rows(resolved)
    except FinetuneError as error:
        return str(error)
    parts = (splits.train, splits.evaluation)
    return [part and {name: list(part[name]) for name in part.column_names if name != "origin"} for part in parts]


def observe_tasks(resolved):
    """Return what each task of a run asks, after which of 8 steps, and in which form."""
    found = []

    def score(asked, prepared, runner):
        found.append((prepared.form.task, prepared.rows, prepared.exemplars, prepared.asked, asked.chat))
        return TaskResult(prepared.form.task, "harness", 1, {}, {}, None, "")

    tokenizer = open_tokenizer(resolved.earlier, find_training_base(resolved))
    template = find_template(resolved.recipe.data.template, tokenizer)
    trainer = MagicMock(args=SimpleNamespace(world_size=1))
    trainer.model.config.max_position_embeddings = 64
    setup = SimpleNamespace(resolved=resolved, tokenizer=tokenizer, template=template)
    scores = TaskScores(trainer, setup, plan_tasks(resolved.recipe.data.tasks, resolved.recipe.trainer))
    with patch("finetune.training.observing.task_scores.score_task", score):
        for step in range(1, 9):
            found.append(step)
            state = SimpleNamespace(global_step=step, max_steps=8, log_history=[], epoch=1.0)
            scores.on_step_end(trainer.args, state, MagicMock())
    return found


def observe_workers(resolved):
    """Return how many processes encode the rows."""
    asked = []

    def encode(encoder, rows, workers):
        asked.append(workers)
        yield from encoder.encode(rows)

    shutil.rmtree(find_cache() / "rows", ignore_errors=True)
    with patch("finetune.data.dataset.encode_rows", encode):
        prepare_rows(resolved)
    return asked


def choose(resolved):
    """Return the precision of a recipe on a CPU."""
    pretrains = resolved.method.is_pretraining
    return choose_precision(resolved.recipe.model.dtype, CPU, resolved.trains_all_weights, keeps_masters=pretrains)


def observe_model(resolved):
    """Return the modules, the configuration and the parameters of the model that would be trained."""
    base = find_training_base(resolved)
    model = load_base(base, resolved.recipe.model, choose(resolved), CPU, resolved.method.head)
    set_seed(resolved.recipe.seed)
    model = attach_adapter(model, resolved.recipe.adapter, base)
    weights = {
        name: (str(value.dtype), tuple(value.shape), value.requires_grad, float(value.detach().double().abs().sum()))
        for name, value in model.named_parameters()
    }
    config = getattr(model, "peft_config", {}).get("default")
    kept = config and (config.r, config.lora_alpha, config.use_rslora)
    return str(model), model.config.to_dict(), model.config._attn_implementation, kept, weights


def observe_storages(resolved):
    """Return how many storages hold the parameters of the model that would be trained."""
    config, precision = make_config(resolved, resolved.evaluates, choose(resolved)), choose(resolved)
    model = build_model(prepare(resolved, config, precision), config, CPU).model
    return len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()})


def observe_trainer(resolved):
    """Return the optimizer's groups, the factors of its rate, the steps, and what the trainer calls at each step."""
    config, precision = make_config(resolved, resolved.evaluates, choose(resolved)), choose(resolved)
    setup = prepare(resolved, config, precision)
    trained = build_model(setup, config, CPU)
    inputs = MethodInputs(setup.states, trained.judge)
    trainer = build_trainer(resolved, trained.model, trained.tokenizer, setup.splits, precision, inputs)
    optimizer = trainer.create_optimizer()
    kinds = {type(parameter).__name__ for group in optimizer.param_groups for parameter in group["params"]}
    groups = [
        (group["lr"], group["weight_decay"], sum(map(torch.numel, group["params"]))) for group in optimizer.param_groups
    ]
    schedule = getattr(trainer, "lr_scheduler", None)
    factors = schedule and [schedule.lr_lambdas[0](step) for step in range(12)]
    calls = sorted(
        f"{type(call).__name__} {vars(call).get('early_stopping_patience')}"
        for call in trainer.callback_handler.callbacks
    )
    return type(optimizer).__name__, kinds, groups, factors, trainer.args.max_steps, calls


def observe_batches(resolved):
    """Return the options that `auto` chooses where every plan fits; a real plan takes seconds."""
    values = dict.fromkeys(Plan.__dataclass_fields__, None)
    plan = Plan(**{**values, "peak_bytes": 1, "fits": True, "memory_bytes": 2})
    with patch("finetune.planning.automatic.make_plan", lambda resolved, target: plan):
        chosen, _ = choose_settings(resolved, choose_target(resolved, 2, None))
    return dict(chosen.recipe.trainer)


def observe_rewards(resolved):
    """Return the weight of each reward, and its values for two answers, which the judge of a test scores 5 and -30."""
    section, score = resolved.recipe.rewards, lambda texts: [5.0, -30.0]
    answers = ["It is 4. Surely.", "4"]
    columns = {
        "prompts": [[{"content": "What is 2 + 2?"}]] * 2,
        "completions": [[{"content": text}] for text in answers],
        "completion_ids": [[700] * 8 + [2], [700, 2]],
        "answer": ["4", "5"],
        "origin": ["row 1", "row 2"],
        "input_ids": [[1, 104], [1, 104]],
    }
    rewards = AnswerRewards(section, [2], score)
    return list_weights(section), [function(**columns) for function in rewards.make_functions()]


def observe_judge(resolved):
    """Return the score that the recipe's judge gives a text."""
    base = load_base(find_training_base(resolved), resolved.recipe.model, choose(resolved), CPU, "language")
    return borrow_base(base, resolved.recipe.rewards.judge.run, 0, 1).score([[1, 104, 900, 106]])


def observe_run(resolved):
    """Return the files that a run leaves."""
    run = Path(run_training(resolved).run)
    return sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())


def observe_speed(resolved):
    """Return what the record of a run says of its speed; the output is another one for each run."""
    run = Path(run_training(resolved.change(output=f"{resolved.output}_{resolved.recipe.model.speed}")).run)
    return json.loads((run / "run.json").read_text()).get("speed")


def observe_output(resolved):
    """Return the run directory."""
    return resolved.output


def observe_chain(file):
    """Return the stages of a chain, with their recipes and options."""
    stages = load_chain(file).stages
    return [(stage.name, dump_recipe(stage.recipe) if hasattr(stage, "recipe") else stage.settings) for stage in stages]


def observe_export(run, output, **options):
    """Return the hashes of an export's files, and whether it was compared with the run."""
    settings = ExportSettings(**options)
    report = export_result(open_result(run), output, settings, LogitVerifier() if settings.verify else None)
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in output.iterdir()
        if file.suffix in (".safetensors", ".gguf", ".json")
    }
    shutil.rmtree(output)
    return files, report.verify is not None
