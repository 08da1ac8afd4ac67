"""The table of verbs: each row has a verb's help, its arguments, the function that runs it, and examples."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from finetune.cli import arguments
from finetune.cli.asking import run_init
from finetune.cli.doing import (
    run_average,
    run_chat,
    run_clean,
    run_demo,
    run_export,
    run_fold,
    run_gguf,
    run_push,
    run_synthesize,
    run_train,
    run_watch,
)
from finetune.cli.looking import (
    run_check,
    run_checkpoints,
    run_doctor,
    run_lint,
    run_mixtures,
    run_plan,
    run_preview,
    run_recipes,
)
from finetune.cli.measuring import experiment_arguments, measuring_arguments
from finetune.cli.measuring.experiments import run_microanneal, run_sweep
from finetune.cli.measuring.measuring import run_dynamics, run_evaluate


@dataclass(frozen=True)
class Verb:
    """One verb; `run` takes the parsed arguments and returns the exit status, `examples` are whole command lines."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: tuple[str, ...]


VERBS: tuple[Verb, ...] = (
    Verb(
        "checkpoints",
        "list the base checkpoints that a run can train from",
        arguments.add_checkpoints,
        run_checkpoints,
        ("finetune checkpoints", "finetune checkpoints --states FOLDER --json"),
    ),
    Verb(
        "init",
        "write a first recipe for your rows and your GPU, after four questions",
        arguments.add_init,
        run_init,
        (
            "finetune init",
            "finetune init --data my.jsonl --device 8GB -o my.yaml --yes",
        ),
    ),
    Verb(
        "recipes",
        "list the shipped recipes, or copy one with every key that it could have",
        arguments.add_recipes,
        run_recipes,
        ("finetune recipes", "finetune recipes sft_qlora -o my.yaml", "finetune recipes --keys"),
    ),
    Verb(
        "mixtures",
        "show what the authors trained on, phase by phase",
        arguments.add_mixtures,
        run_mixtures,
        ("finetune mixtures", "finetune mixtures --phase 26", "finetune mixtures --plot mixtures.png"),
    ),
    Verb(
        "fold",
        "write the exact Llama form of a checkpoint",
        arguments.add_fold,
        run_fold,
        ("finetune fold phase20 -o exports/phase20", "finetune fold base -o exports/base --dtype bfloat16"),
    ),
    Verb(
        "check",
        "check a recipe without loading anything",
        arguments.add_recipe,
        run_check,
        ("finetune check my.yaml", "finetune check sft_qlora -s data.train=my.jsonl"),
    ),
    Verb(
        "preview",
        "show rows as the model will see them, with the trained text marked",
        arguments.add_preview,
        run_preview,
        (
            "finetune preview sft_qlora -s data.train=my.jsonl",
            "finetune preview my.yaml -n 5 --html rows.html",
        ),
    ),
    Verb(
        "lint",
        "look for problems in the rows: duplicates, empty answers, overlap and more",
        arguments.add_lint,
        run_lint,
        ("finetune lint sft_qlora -s data.train=my.jsonl", "finetune lint my.yaml --fix clean --only duplicate"),
    ),
    Verb(
        "clean",
        "make a training set of raw rows, by the steps of the recipe's section clean",
        arguments.add_clean,
        run_clean,
        (
            "finetune clean my.yaml -o cleaned",
            "finetune clean my.yaml -s clean.exact_duplicates=true -o cleaned --json",
            "finetune clean my.yaml --emit datatrove -o pipeline.py",
        ),
    ),
    Verb(
        "synthesize",
        "write new rows or pairs with a model, from prompts, texts or rows",
        arguments.add_synthesize,
        run_synthesize,
        ("finetune synthesize my.yaml --dry-run", "finetune synthesize my.yaml -o written"),
    ),
    Verb(
        "plan",
        "predict memory and time of a training step, without a GPU and without weights",
        arguments.add_plan,
        run_plan,
        (
            "finetune plan sft_qlora --memory 8GB",
            'finetune plan sft_lora --gpu "RTX 4090" --fit',
            "finetune plan sft_full --processes 4 --engine fsdp2",
        ),
    ),
    Verb(
        "doctor",
        "show what this machine has, and which types and kernels the kit will use on it",
        arguments.add_nothing,
        run_doctor,
        ("finetune doctor", "finetune doctor --json"),
    ),
    Verb(
        "train",
        "train a recipe, and write a run directory",
        arguments.add_train,
        run_train,
        (
            "finetune train sft_qlora -s data.train=my.jsonl -s output=runs/mine",
            "finetune train sft_qlora -s data.train=my.jsonl -s output=runs/mine --resume",
            "finetune train dpo_qlora -s model.checkpoint=runs/mine -s data.train=pairs.jsonl",
        ),
    ),
    Verb(
        "watch",
        "show runs on one page, live while they train: curves, warnings, answers, what differs",
        arguments.add_watch,
        run_watch,
        ("finetune watch runs/mine", "finetune watch runs/one runs/two -o compared.html"),
    ),
    Verb(
        "export",
        "merge a run into Llama-format weights, and verify them",
        arguments.add_export,
        run_export,
        (
            "finetune export runs/mine -o exports/mine",
            "finetune export runs/mine -o exports/mine --dtype bfloat16 --base auto --gguf q8_0 --gguf q5_0",
            "finetune export runs/mine -o adapters/mine --adapter --push me/mine-lora",
        ),
    ),
    Verb(
        "push",
        "upload a run's adapter or an export to the hub, with its card; private unless asked otherwise",
        arguments.add_push,
        run_push,
        ("finetune push runs/mine me/mine-lora", "finetune push exports/mine me/mine --public"),
    ),
    Verb(
        "average",
        "average the weights of runs or models into one folder of Llama weights",
        arguments.add_average,
        run_average,
        (
            "finetune average runs/mine/checkpoint-100 runs/mine/checkpoint-200 -o exports/averaged",
            "finetune average phase24 phase25 -o exports/averaged --dtype bfloat16",
        ),
    ),
    Verb(
        "gguf",
        "write a folder of Llama weights as a GGUF file, and verify it",
        arguments.add_gguf,
        run_gguf,
        (
            "finetune gguf exports/mine -o mine-q8_0.gguf --type q8_0",
            "finetune gguf exports/mine -o mine-f16.gguf --type f16 --json",
        ),
    ),
    Verb(
        "evaluate",
        "measure loss and accuracy on held-out rows, or the scores of LAMBADA, GSM8K and HumanEval",
        measuring_arguments.add_evaluate,
        run_evaluate,
        (
            "finetune evaluate runs/mine --data held_out.jsonl",
            "finetune evaluate base --tasks lambada,gsm8k,humaneval",
            "finetune evaluate runs/mine --tasks gsm8k --limit 100 --task-data gsm8k_test.jsonl --exemplars gsm8k_train.jsonl",
        ),
    ),
    Verb(
        "dynamics",
        "measure many checkpoints side by side: published and own scores, tests of each step, weights",
        measuring_arguments.add_dynamics,
        run_dynamics,
        (
            "finetune dynamics phase5 phase10 phase15 phase20 phase25 base-4k base --published",
            "finetune dynamics phase5 phase15 phase25 base --tasks lambada,gsm8k -o dynamics/scores --keep none",
            "finetune dynamics runs/mine/checkpoint-100 runs/mine/checkpoint-200 runs/mine -o dynamics/mine",
        ),
    ),
    Verb(
        "microanneal",
        "say whether new data is worth it: anneal with and without it from the same state, and compare",
        experiment_arguments.add_microanneal,
        run_microanneal,
        (
            "finetune microanneal --candidate my.jsonl --mixture phase26 -s data.sources.code=code.jsonl -s data.sources.web=web.jsonl "
            "--from before-annealing --tokens 20M -o microanneal/mine",
            "finetune microanneal --candidate my.jsonl --share 0.2 --recipe my.yaml --from runs/stable/model --tokens 500K "
            "--held-out held.jsonl -o microanneal/mine",
        ),
    ),
    Verb(
        "sweep",
        "train a recipe with several values and seeds, on the same rows: one table, one picture",
        experiment_arguments.add_sweep,
        run_sweep,
        (
            "finetune sweep my.yaml -s trainer.learning_rate=1e-4,2e-4,5e-4 --seeds 3 -o sweeps/rate",
            "finetune sweep my.yaml -s adapter.rank=8,32 -s 'adapter.targets=[q_proj,v_proj],[all-linear]' -o sweeps/rank",
        ),
    ),
    Verb(
        "chat",
        "chat with the model of a run, or with any other",
        arguments.add_chat,
        run_chat,
        ("finetune chat runs/mine", 'finetune chat exports/mine --prompt "Who are you?" --temperature 0.7'),
    ),
    Verb(
        "demo",
        "run every step of the kit in miniature: train, export, verify, answer",
        arguments.add_demo,
        run_demo,
        ("finetune demo", "finetune demo -o runs/second-demo"),
    ),
)
