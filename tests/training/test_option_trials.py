"""Options that a library refuses, or that train nothing, end in one message; what a finished run must not be taken for is said."""

import json
import shutil

import pytest
from peft import PeftModel

from finetune.errors import CheckpointError, OutputError, RecipeError, TrainingError
from finetune.evaluation.pairs import evaluate_pairs
from finetune.runs.summary import describe_run
from finetune.training.run import run_training

EVERY_STEP = [f"trainer.{name}_{key}" for name in ("eval", "save") for key in ("strategy=steps", "steps=1")]
BEST = ["trainer.load_best_model_at_end=true", *EVERY_STEP]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.lr_scheduler_kwargs={foo: 1}"], r"trainer.lr_scheduler_kwargs: .*unexpected keyword argument 'foo'"),
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "trainer.lr_scheduler_type: .*min_lr"),
        (["trainer.report_to=nonsense"], "trainer.report_to: 'nonsense' is unknown; did you mean 'none'"),
        (["trainer.torch_compile_backend=foo"], "trainer.torch_compile_backend: 'FOO' is not"),
        (["trainer.accelerator_config={foo: 1}"], "trainer.accelerator_config: "),
        (["trainer.lr_scheduler_type=reduce_lr_on_plateau"], "trainer.lr_scheduler_type: "),
    ],
)
def test_what_a_library_refuses_is_named_by_its_key(make_recipe, tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message):
        run_training(make_recipe("run", *settings))
    assert not (tmp_path / "run").exists()


def test_rows_that_fill_no_batch(make_recipe, tmp_path):
    with pytest.raises(TrainingError, match=r"trainer.dataloader_drop_last: 32 rows fill no batch of 64"):
        run_training(make_recipe("run", "trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=64"))
    assert not (tmp_path / "run").exists()


def test_a_metric_that_is_not_measured(make_recipe, tmp_path):
    with pytest.raises(TrainingError, match=r"trainer.metric_for_best_model: 'accuracy' is unknown; known are .*loss"):
        run_training(make_recipe("run", *BEST, "trainer.metric_for_best_model=accuracy"))
    assert not (tmp_path / "run").exists()


def test_the_summary_is_about_the_weights_that_were_kept(make_recipe, tmp_path):
    """The loss falls, so the step with the highest loss is the first; the last one's loss was reported."""
    highest = ["trainer.metric_for_best_model=loss", "trainer.greater_is_better=true"]
    summary = run_training(make_recipe("run", *BEST, *highest, "trainer.learning_rate=1e-2", "trainer.max_steps=3"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = max(losses, key=losses.get)
    assert (summary.best_step, summary.eval_loss) == (best, losses[best])
    assert summary.eval_loss > losses[3]
    assert summary.train_loss == next(line["loss"] for line in lines if line["step"] == best and "loss" in line)
    assert f"weights and losses of step {best}, the best one" in describe_run(summary)


def test_a_run_stops_when_it_gets_no_better(make_recipe):
    settings = ["trainer.early_stopping_patience=2", "trainer.learning_rate=0", "trainer.max_steps=8"]
    assert run_training(make_recipe("run", *BEST, *settings)).steps == 3


def test_a_run_without_optimizer_states_is_not_resumed(make_recipe, monkeypatch):
    settings = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_only_model=true"]
    monkeypatch.setattr("finetune.training.run.write_result", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training(make_recipe("run", *settings))
    with pytest.raises(TrainingError, match=r"hold no optimizer state \(trainer.save_only_model: true\)"):
        run_training(make_recipe("run", *settings), resume=True)


@pytest.fixture
def make_prompts(make_recipe, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n' * 4)
    online = [
        "method=grpo",
        "data.train=prompts.jsonl",
        "data.eval=[]",
        "trainer.num_generations=2",
        "trainer.max_steps=1",
    ]
    return lambda *overrides: make_recipe("run", *online, *overrides)


def test_equal_rewards_are_said(make_prompts):
    """No answer of nano is right, so every reward is 0; the run ended as a success."""
    summary = run_training(make_prompts("rewards.rules={final_answer: 1.0}", "trainer.max_completion_length=4"))
    assert len(summary.warnings) == 1
    assert "nothing was learnt from the rewards" in describe_run(summary)


@pytest.mark.parametrize(
    "setting", ["train_tokens=[]", "train_tokens=[104, 106]", "modules_to_save=[embed_tokens, lm_head]"]
)
def test_a_reward_model_from_an_sft_run(train, make_pairs_recipe, tmp_path, setting):
    """It always failed with a KeyError: PEFT wanted the values of the new head, which no SFT run has."""
    sft = train("sft", f"adapter.{setting}", "trainer.max_steps=1")
    run_training(
        make_pairs_recipe("reward", "reward", f"model.checkpoint={sft}", "data.max_tokens=256", "trainer.max_steps=2")
    )
    scores = evaluate_pairs(str(tmp_path / "reward"), [tmp_path / "held_pairs.jsonl"], 256)
    assert scores.measure == "score"
    assert scores.pairs == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 4},
            "num_attention_heads 6 is not a multiple of num_key_value_heads 4; "
            "hidden_size 320 is not a multiple of num_attention_heads 6$",  # and nothing of a head_dim of 53, which nobody set
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 5 is not a multiple of num_key_value_heads 3"),
        # 9 weights and 4 biases of attention in each of 95 layers.
        ({"num_hidden_layers": 99}, r"1235 missing \(model\.layers\.4\.input_layernorm\.weight, "),
        ({"quantization_config": {"quant_method": "gptq"}}, r"its weights are quantized \(gptq\)"),
        ({"intermediate_size": "big"}, "intermediate_size must be a whole number from 1 to 16,777,216; found 'big'"),
    ],
)
def test_a_base_whose_sizes_contradict_each_other(make_recipe, nano_llama, tmp_path, changes, message):
    base = tmp_path / "base"
    shutil.copytree(nano_llama, base)
    config = {key: value for key, value in json.loads((base / "config.json").read_text()).items() if key != "head_dim"}
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        run_training(make_recipe("run", f"model.checkpoint={base}"))


def test_a_base_without_tokenizer_is_refused_before_it_is_folded(make_recipe, nano, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(nano, base)
    (base / "tokenizer.json").unlink()
    monkeypatch.setattr("finetune.checkpoints.finding.fold_checkpoint", lambda *arguments: 1 / 0)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        run_training(make_recipe("run", f"model.checkpoint={base}"))


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("rows.jsonl/x", OutputError, "rows.jsonl is a file, not a folder"),
        ("a" * 300, RecipeError, "output: a name in it is longer than 255 bytes"),
        ("new/" + "a" * 300, RecipeError, "output: a name in it is longer than 255 bytes"),
    ],
)
def test_outputs_that_cannot_be(make_recipe, tmp_path, output, error, message):
    with pytest.raises(error, match=message):
        run_training(make_recipe("run", f"output={tmp_path / output}"))
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_while_a_checkpoint_is_written(make_recipe, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        run_training(make_recipe("run", "trainer.save_strategy=steps", "trainer.save_steps=1"))
