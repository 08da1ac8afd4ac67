"""A reward run as the judge of GRPO and RLOO: it reads with the base that is trained, and gives what it gives by itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.check.recipes import load_recipe
from finetune.cli.main import main
from finetune.data.encoding.template import find_template
from finetune.errors import RecipeError, TrainingError
from finetune.files.resources import find_demo_data
from finetune.models.engine import check_engine
from finetune.models.loading import load_base
from finetune.models.lora import attach_adapter
from finetune.models.precision import Precision
from finetune.planning.step.online_step import count_judge_bytes
from finetune.recipe.sections import JudgeSection, RewardsSection
from finetune.rewards.judge import borrow_base, check_judge, open_judge
from finetune.rewards.reward_functions import AnswerRewards
from finetune.runs.results import open_result
from finetune.training.run import run_training

TRAINER = """
  max_steps: 2
  learning_rate: 2e-2
  per_device_train_batch_size: 4
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""
REWARD = f"""
method: reward
model: {{checkpoint: nano}}
data: {{train: {find_demo_data("pairs.jsonl")}, max_tokens: 256}}
adapter: {{rank: 4, targets: [q_proj, down_proj], train_tokens: [104, 106], modules_to_save: [norm], dropout: 0.1}}
trainer: {TRAINER}"""
GRPO = f"""
method: grpo
model: {{checkpoint: nano}}
data: {{train: {find_demo_data("demo.jsonl")}, max_tokens: 128, overflow: drop}}
adapter: {{rank: 2}}
answers: 0
rewards: {{rules: {{language: 0.5}}, judge: {{run: RUN, weight: 2, clip: [-0.5, 0.25]}}}}
trainer: {TRAINER}
  num_generations: 4
  max_completion_length: 6
"""
PROMPTS = [[1, 104, 900, 901], [1, 104, 902]]
ANSWERS = [[700, 701, 106], [702, 2, 703, 704, 106]]


@pytest.fixture(scope="module")
def judge_run(tmp_path_factory, nano_llama):
    """A reward run with trained token rows, a norm that is trained whole, and dropout."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "reward.yaml").write_text(REWARD + f"output: {folder / 'reward'}\n", encoding="utf-8")
    run_training(load_recipe(folder / "reward.yaml"))
    return folder / "reward"


@pytest.fixture
def make_recipe(tmp_path, judge_run):
    """Return a function that checks the recipe with overrides; its run lies in `tmp_path/<name>`."""
    (tmp_path / "recipe.yaml").write_text(GRPO.replace("RUN", str(judge_run)), encoding="utf-8")
    return lambda name, *overrides: load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / name}", *overrides])


@pytest.fixture
def copy_judge(tmp_path, judge_run):
    """Return a function that copies the reward run, with another record of where it comes from."""

    def copy(name, **values):
        shutil.copytree(judge_run, tmp_path / name)
        origin = tmp_path / name / "adapter" / "finetune.json"
        origin.write_text(json.dumps({**json.loads(origin.read_text()), **values}))
        return tmp_path / name

    return copy


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("tokens", "quantize"), [("[]", "none"), ("[105]", "nf4"), ("[104]", "none"), ("[104]", "nf4"), ("[]", "int8")]
)
def test_a_judge_that_borrows_the_base_gives_what_it_gives_by_itself(
    copy_judge, make_recipe, nano_llama, tokens, quantize
):
    judge_run = copy_judge("judge", quantize=quantize)
    overrides = [f"rewards.judge.run={judge_run}", f"adapter.train_tokens={tokens}", f"model.quantize={quantize}"]
    recipe = make_recipe("run", *overrides)
    base = load_base(nano_llama, recipe.recipe.model, Precision(torch.float32, "no"), torch.device("cpu"))
    judge = borrow_base(base, str(judge_run), pad_token=102, batch_size=2)
    model = attach_adapter(base, recipe.recipe.adapter, nano_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)  # what the trained adapter says must not reach the judge
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ids = torch.tensor([PROMPTS[0]])
    before = model(input_ids=ids).logits
    texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    found = judge.score(texts)
    alone = open_judge(open_result(judge_run))
    # On CPUs bitsandbytes rounds what int8 weights are multiplied with, but not in a model that is trained.
    within = {"rel": 2e-2} if quantize == "int8" else {"abs": 1e-5}
    assert found == pytest.approx(alone.score(texts), **within)
    assert found == pytest.approx([alone.score([text])[0] for text in texts], **within)
    assert abs(found[0] - found[1]) > 1e-3
    assert torch.equal(model(input_ids=ids).logits, before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = [parameter for parameter in judge.model.parameters() if parameter.data_ptr() not in shared]
    saved = load_file(judge_run / "adapter" / "adapter_model.safetensors")
    assert sum(parameter.numel() for parameter in own) + judge.head.numel() == sum(map(torch.numel, saved.values()))


def test_scores_are_clipped_and_must_be_numbers():
    section = RewardsSection(judge=JudgeSection(run="runs/judge", clip=(-20.0, 10.0)))
    batch = {
        "prompts": [[{"role": "user", "content": "q"}]] * 3,
        "completions": [[{"role": "assistant", "content": "a"}]] * 3,
        "completion_ids": [[7, 106], [8, 106], [9]],
        "input_ids": [[1, 2], [1, 3], [1, 4]],
        "answer": [None] * 3,
        "origin": ["f, line 1", "f, line 2", "f, line 3"],
        "trainer_state": None,
    }
    seen = []
    rewards = AnswerRewards(section, [106], lambda texts: seen.extend(texts) or [-31.5, 4.0, 12.0])
    (judge,) = rewards.make_functions()
    assert (judge.__name__, judge(**batch)) == ("judge", [-20.0, 4.0, 10.0])
    assert seen == [[1, 2, 7, 106], [1, 3, 8, 106], [1, 4, 9]]
    assert [answer.rewards for answer in rewards.answers] == [{"judge": -20.0}, {"judge": 4.0}, {"judge": 10.0}]
    (judge,) = AnswerRewards(section, [106], lambda texts: [1.0, float("nan"), 2.0]).make_functions()
    with pytest.raises(
        TrainingError, match="f, line 2: the judge gave nan for an answer to this row; expected a finite"
    ):
        judge(**batch)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_is_rewarded_by_rules_and_judge_and_resumes_to_the_bit(make_recipe, tmp_path, method):
    overrides = [f"method={method}", "trainer.beta=0.1", "trainer.save_strategy=steps", "trainer.save_steps=1"]
    for name in ("straight", "resumed"):
        run_training(make_recipe(name, *overrides))
    run = tmp_path / "straight"
    for line in (line for line in read_lines(run / "metrics.jsonl") if "loss" in line):
        expected = 0.5 * line["rewards/language/mean"] + 2 * line["rewards/judge/mean"]
        assert line["reward"] == pytest.approx(expected, abs=1e-6)
    scores = [answer["rewards"]["judge"] for answer in read_lines(run / "completions.jsonl")]
    assert all(-0.5 <= score <= 0.25 for score in scores)
    assert len(set(scores)) > 1
    assert not (run / "adapter" / "judge").exists()
    for name in ("adapter", "checkpoint-2"):
        shutil.rmtree(tmp_path / "resumed" / name)
    run_training(make_recipe("resumed", *overrides), resume=True)
    weights = [load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("straight", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_with_another_judge_is_not_resumed(make_recipe, copy_judge, tmp_path):
    judge = copy_judge("judge")
    overrides = [f"rewards.judge.run={judge}", "trainer.save_strategy=steps", "trainer.save_steps=1"]
    run_training(make_recipe("run", *overrides))
    for name in ("adapter", "checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / name)
    file = judge / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="the judge changed since this run started"):
        run_training(make_recipe("run", *overrides), resume=True)


def test_a_judge_of_other_content_is_refused_before_weights_are_loaded(
    make_recipe, copy_judge, tmp_path, judge_run, nano_llama
):
    other = copy_judge("judge", base_fingerprint="0" * 64)
    with pytest.raises(
        TrainingError, match=r"was trained on nano .* holds other weights; .* from the same base checkpoint"
    ):
        run_training(make_recipe("run", f"rewards.judge.run={other}"))
    assert not (tmp_path / "run").exists()
    template = find_template("chatml", open_judge(open_result(judge_run)).tokenizer)
    with pytest.raises(TrainingError, match="was trained with the template yulan-mini, and this run uses chatml"):
        check_judge(str(judge_run), nano_llama, template)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rewards.judge.run=nowhere"], "rewards.judge.run: nowhere: there is no such folder"),
        (["rewards.judge.run=''"], "rewards.judge.run: is missing; name a finished run of method: reward"),
        (["rewards.judge.weight=0"], "rewards.judge.weight: must be above 0; found 0"),
        (["rewards.judge.clip=[10, -20]"], "rewards.judge.clip: must be the lowest and the highest score, such as"),
        (["rewards.judge.clip=[-20]"], "rewards.judge.clip: must be the lowest and the highest"),
        (["rewards.judge.wieght=1"], "rewards.judge.wieght: unknown key; did you mean 'weight'?"),
        (["model.checkpoint=base"], "rewards.judge.run: {run} was trained on nano, and this run trains on base"),
        (
            ["model.quantize=nf4"],
            "model.quantize: the judge {run} was trained with none, and uses the base model of this run",
        ),
        (["model.rope_theta=490000"], "model.rope_theta: the judge {run} was trained with that of its checkpoint"),
        (["model.architecture=native"], "model.architecture: the judge needs a base model of Llama weights"),
        (
            ["adapter={kind: none}"],
            "adapter.kind: the judge uses the base model of this run, so training must not change it; set lora",
        ),
        (["adapter.init=pissa"], "adapter.init: pissa changes the base model, which the judge uses too"),
        (
            ["data.template=chatml"],
            "data.template: the judge {run} was trained with yulan-mini; set that; found chatml",
        ),
        (["method=dpo", "trainer={}"], "rewards: has no effect on dpo"),
    ],
)
def test_each_mistake_has_its_own_sentence(make_recipe, judge_run, overrides, problem):
    with pytest.raises(RecipeError) as caught:
        make_recipe("run", *overrides)
    found = caught.value.problems
    assert any(text.startswith(problem.replace("{run}", str(judge_run))) for text in found), found


def test_what_is_no_judge_for_this_run_is_told(make_recipe, copy_judge):
    def tell(*overrides):
        with pytest.raises(RecipeError) as caught:
            make_recipe("run", *overrides)
        return "\n".join(caught.value.problems)

    unfinished = copy_judge("unfinished")
    shutil.rmtree(unfinished / "adapter")
    assert "rewards.judge.run: " in tell(f"rewards.judge.run={unfinished}")
    assert "this run has not finished" in tell(f"rewards.judge.run={unfinished}")
    speaker = copy_judge("speaker", method="dpo")
    assert f"{speaker} is no reward model; train one with method: reward" in tell(f"rewards.judge.run={speaker}")
    whole = copy_judge("whole")
    (whole / "adapter").rename(whole / "model")
    (whole / "model" / "adapter_config.json").unlink()
    assert "it would be a second model in memory" in tell(f"rewards.judge.run={whole}")
    earlier = copy_judge("earlier", method="sft", base_fingerprint="0" * 64, template_fingerprint="0" * 16)
    told = tell(f"model.checkpoint={earlier}", "adapter={}")
    assert "both must have the same base checkpoint" in told
    assert "both must have the same template" in told


def test_a_judge_needs_the_whole_base_and_is_planned(make_recipe, judge_run):
    recipe = make_recipe("run")
    check_engine(recipe, "ddp")
    with pytest.raises(
        RecipeError, match=r"rewards.judge.run: the judge needs the whole base model, and FSDP2 shards it"
    ):
        check_engine(recipe, "fsdp2")
    assert count_judge_bytes(recipe.recipe) == (judge_run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert recipe.recipe.rewards.judge.run == str(Path(judge_run).resolve())


def test_a_reward_run_scores_pairs_and_cannot_chat(copy_judge, tmp_path, capsys):
    run = copy_judge("quantized", quantize="nf4")
    pairs = [
        {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Q?", "chosen": "A", "rejected": "B" * 99},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, capsys.readouterr()

    status, printed = call("evaluate", run, "--data", tmp_path / "pairs.jsonl", "--max-tokens", 40, "--json")
    assert status == 0
    found = json.loads(printed.out)
    assert (found["pairs"], found["measure"]) == (1, "score")
    assert found["accuracy"] == float(found["margin"] > 0)
    assert "1 row is longer than data.max_tokens: 40" in printed.err
    assert "reading 1 pair" in printed.err
    status, printed = call("chat", run, "--prompt", "Q?")
    assert (status, printed.out) == (2, "")
    told = printed.err.strip().splitlines()[-1]
    assert told.startswith(
        f"finetune chat: {run}/adapter: is a reward model, which scores texts and cannot generate answers;"
    )
