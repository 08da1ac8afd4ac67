"""GRPO and RLOO: prompts in our own tokens, rewards by the recipe's rules, exact resuming, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.check.recipes import load_recipe
from finetune.data.encoding.rendering import encode_prompt
from finetune.data.encoding.template import find_template, list_stop_tokens
from finetune.data.encoding.tokenizer import load_tokenizer
from finetune.data.preview.preview import describe_preview, preview_rows
from finetune.errors import DataError, RecipeError, TrainingError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.rewards.rules import RULES, Rule
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.online import bind_template
from finetune.training.run import run_training
from finetune.training.trainer import build_trainer
from finetune.training.training_rows import prepare_rows

RECIPE = """
method: grpo
model: {checkpoint: nano}
data: {train: rows.jsonl, eval: held.jsonl, columns: {prompt: question, answer: answer}, max_tokens: 128}
adapter: {rank: 4, alpha: 8}
rewards: {rules: {language: 1.0, final_answer: 2.0, truncated: 0.5}}
answers: 0
trainer:
  max_steps: 2
  learning_rate: 2e-3
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 4
  num_generations: 4
  max_completion_length: 6
  beta: 0.1
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""
ROWS = [
    {"question": "Tom has 3 pens and buys 4. How many pens has he?", "answer": "3 + 4 = 7\n#### 7"},
    {"question": "小明有五个苹果，吃了两个，还有几个？", "answer": "5 - 2 = 3\n#### 3"},
    {"question": "What does <|eot_id|> <s> mean? Count to 2.", "answer": 2},
    {"question": "How much is 6 times 7?", "answer": "#### 42"},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_recipe(tmp_path, nano_llama):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "held.jsonl", ROWS[:2])
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make(name, *overrides):
        return load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / name}", *overrides])

    return make


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_trl_is_given_our_tokens(nano_llama):
    """The library would turn a control token's spelling in a question into the token itself."""
    tokenizer = load_tokenizer(nano_llama)
    template = find_template("auto", tokenizer)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": ROWS[2]["question"]}]
    bound = bind_template(tokenizer, template)
    found = bound.apply_chat_template(
        conversation=[messages], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = found["input_ids"][0]
    assert ids == encode_prompt(tokenizer, template, messages)
    stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert ids.count(stop) == 2  # the system's and the user's own ends, not the one that is spelled
    assert ids.count(tokenizer.bos_token_id) == 1
    assert "<|eot_id|> <s> mean" in tokenizer.decode(ids)
    plain = tokenizer.apply_chat_template(
        [messages], chat_template=template.source, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert plain["input_ids"][0].count(stop) == 3


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_generation_begins_with_the_prepared_prompts_and_ends_at_our_stop_tokens(make_recipe, method, monkeypatch):
    from finetune.training import run as training

    recipe = make_recipe("run", f"method={method}", "trainer.max_steps=2")
    seen = {}

    def build(*arguments):
        trainer = build_trainer(*arguments)
        generate, tokenizer = trainer._generate_single_turn, arguments[2]

        def look(prompt_ids, *rest):
            seen.setdefault("prompts", []).extend(prompt_ids)
            seen["config"] = trainer.generation_config
            return generate(prompt_ids, *rest)

        trainer._generate_single_turn = look
        seen["stops"] = list_stop_tokens(tokenizer, find_template("auto", tokenizer))
        return trainer

    monkeypatch.setattr(training, "build_trainer", build)
    run_training(recipe)
    _, splits = prepare_rows(recipe)
    prepared = {tuple(ids) for ids in [*splits.train["input_ids"], *splits.evaluation["input_ids"]]}
    assert {tuple(ids) for ids in seen["prompts"]} == prepared
    assert seen["config"].eos_token_id == seen["stops"]
    assert len(seen["stops"]) == 2


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_trains_is_logged_and_exports(make_recipe, tmp_path, method):
    overrides = [f"method={method}", "model.quantize=nf4", "trainer.eval_strategy=epoch", "answers=4"]
    summary = run_training(make_recipe("run", *overrides))
    run = tmp_path / "run"
    logged = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2]
    for line in logged:
        parts = {name: line[f"rewards/{name}/mean"] for name in ("language", "final_answer", "truncated")}
        expected = parts["language"] + 2 * parts["final_answer"] + 0.5 * parts["truncated"]
        assert line["reward"] == pytest.approx(expected, abs=1e-6)
        assert line["completions/mean_length"] <= 6
    assert logged[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the start itself
    assert logged[1]["kl"] != 0.0
    assert summary.train_reward == logged[-1]["reward"]
    assert summary.eval_reward is not None
    answers = read_lines(run / "completions.jsonl")
    assert {answer["step"] for answer in answers} == {1, 2}
    assert all(set(answer["rewards"]) == {"language", "final_answer", "truncated"} for answer in answers)
    assert all(answer["origin"].startswith(str(tmp_path / "rows.jsonl, line ")) for answer in answers)
    assert {path.name for path in (run / "adapter").iterdir()}.isdisjoint({"ref"})
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in weights.items())
    report = export_result(open_result(run), tmp_path / "export", ExportSettings("auto", "2GB"), LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    assert report.verify.rows > 0
    assert report.bases.trained_loss > 0


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_resuming_is_bit_for_bit_the_same_run(make_recipe, tmp_path, method):
    overrides = [f"method={method}", "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    run_training(make_recipe("straight", *overrides))
    run_training(make_recipe("resumed", *overrides))
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "resumed" / name)
    run_training(make_recipe("resumed", *overrides), resume=True)
    first, second = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("straight", "resumed"))
    assert set(first) == set(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    completions = [read_lines(tmp_path / name / "completions.jsonl") for name in ("straight", "resumed")]
    assert completions[0] == completions[1]


def test_rows_of_every_kind_become_prompts(make_recipe, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                *({"role": r, "content": r} for r in ("user", "assistant", "user")),
                {"role": "assistant", "content": "9"},
            ]
        },
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "held.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    tokenizer, splits = prepare_rows(make_recipe("run", "data.columns={}", "data.system=s"))
    assert splits.train["prompt"][0] == [{"role": "system", "content": "s"}, {"role": "user", "content": "a?"}]
    assert [turn["role"] for turn in splits.train["prompt"][1]] == ["system", "user", "assistant", "user"]
    assert list(splits.train["answer"]) == ["b", "9"]
    assert list(splits.evaluation["answer"]) == ["yes"]
    assert all(label == -100 for row in splits.train["labels"] for label in row)
    shown = describe_preview(preview_rows(splits, tokenizer, 1), in_colour=False)
    assert shown.startswith("These are prompts: the model writes the answers")
    assert "line 1 (prompt; reference answer: 'b'): " in shown


def test_a_row_without_the_answer_that_a_rule_needs_is_named(make_recipe, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*ROWS, {"question": "no answer here"}])
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 5: has no answer, which the reward final_answer compares with"
    ):
        run_training(make_recipe("run"))
    assert not (tmp_path / "run").exists()
    write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "  "}, {"question": 4, "answer": "1"}])
    with pytest.raises(DataError, match=r"(?s)line 1: answer is empty.*line 2: prompt is a number"):
        prepare_rows(make_recipe("run"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "much"])
def test_a_rule_that_gives_no_number_stops_the_run_with_the_row(make_recipe, tmp_path, monkeypatch, value):
    monkeypatch.setitem(RULES, "language", Rule("language", lambda answer: value, ""))
    with pytest.raises(TrainingError, match=r"\.jsonl, line \d: the reward language gave .* expected a finite number"):
        run_training(make_recipe("run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rewards.rules={}"], "rewards.rules: is missing; grpo needs rules with their weights"),
        (["rewards.rules={final_anser: 1}"], "rewards.rules.final_anser: unknown key; did you mean 'final_answer'?"),
        (["rewards.rules={truncated: -1}"], "rewards.rules.truncated: must be above 0"),
        (["rewards.rules={length: 1}"], "rewards.length_tokens: is missing; the rule length needs"),
        (["rewards.length_tokens=9"], "rewards.length_tokens: needs the rule length, which rewards.rules lacks"),
        (["rewards.rules.length=1", "rewards.length_tokens=0"], "rewards.length_tokens: must be at least 1"),
        (["data.overflow=truncate"], "data.overflow: truncate would cut off the end of prompts; set drop or error"),
        (["data.train_on=last"], "data.train_on: "),
        (["trainer.auto=true"], "trainer.auto: cannot predict the memory for generating answers"),
        (["trainer.use_vllm=true"], "trainer.use_vllm: the trained model generates the answers in this process"),
        (["trainer.reward_weights=[1]"], "trainer.reward_weights: set rewards.rules"),
        (["method=sft"], "rewards: has no effect on sft; remove it, or set method: grpo or rloo"),
    ],
)
def test_each_mistake_has_its_own_sentence(make_recipe, overrides, problem):
    with pytest.raises(RecipeError) as caught:
        make_recipe("run", *overrides)
    assert any(found.startswith(problem) for found in caught.value.problems), caught.value.problems


def test_trl_s_refusals_are_sentences(make_recipe):
    with pytest.raises(RecipeError, match=r"generation_batch_size .* must be divisible by num_generations"):
        run_training(make_recipe("run", "trainer.num_generations=3"))
