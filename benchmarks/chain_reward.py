"""Train on two styles of answers, let DPO choose between them by a rule, and measure the reward of held-out questions before and after.

    python benchmarks/chain_reward.py [--seeds 3]

One command runs the chain SFT -> pairs -> DPO -> export on `nano`. The rows are sums; one half of the answers marks its result, as in
`#### 7`, the other half says it in a sentence. After SFT the model writes both. The pairs are its own answers, the best against the
worst by the rules `format`, `length` and `truncated`. Each stage then answers questions that it has not seen, with draws of
temperature 1, and the same rules score them. The benchmark writes chain_reward.md beside this file.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from finetune.check.chains import load_chain
from finetune.models.opening import open_model
from finetune.pipeline.chain import run_chain
from finetune.rewards.reward_functions import judge_answer
from finetune.rewards.rules import Answer

RULES = {"format": 1.0, "length": 0.5, "truncated": 0.5}
MOST_TOKENS, WANTED_TOKENS, DRAWS = 32, 20, 2
STAGES = ("sft", "dpo")
CHAIN = """
model: {{checkpoint: nano}}
data: {{train: rows.jsonl, max_tokens: 128}}
adapter: {{rank: 16, alpha: 32}}
seed: {seed}
answers: 0
trainer: {{per_device_train_batch_size: 8, logging_steps: 10, save_strategy: "no", gradient_checkpointing: false, disable_tqdm: true}}
stages:
  - {{name: sft, trainer: {{max_steps: {sft_steps}, learning_rate: 2e-3}}}}
  - name: pairs
    data: {{train: prompts.jsonl}}
    synthesize: {{job: pairs, samples: 4, temperature: 1.0, max_tokens: {most}, rules: {rules}, length_tokens: {wanted}}}
  - {{name: dpo, method: dpo, trainer: {{max_steps: {dpo_steps}, learning_rate: {rate}, beta: {beta}}}}}
  - {{name: model, export: {{dtype: float32, verify: false}}}}
"""


def write_files(folder: Path, seed: int, **settings: float) -> list[str]:
    """Write the chain and its rows, and return the held-out questions."""
    draw = random.Random(seed)
    sums = [(one, other) for one in range(1, 13) for other in range(1, 13)]
    draw.shuffle(sums)
    rows = []
    for number, (one, other) in enumerate(sums[:96]):
        end = f"#### {one + other}" if number % 2 else f"The answer is {one + other}."
        rows.append({"prompt": ask(one, other), "completion": f"{one} + {other} = {one + other}. {end}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = [{"prompt": row["prompt"]} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    given = {"sft_steps": 60, "dpo_steps": 30, "rate": 1e-4, "beta": 0.1, **settings}
    rules = json.dumps(RULES).replace('"', "")
    text = CHAIN.format(seed=seed, most=MOST_TOKENS, wanted=WANTED_TOKENS, rules=rules, **given)
    (folder / "chain.yaml").write_text(text, encoding="utf-8")
    return [ask(one, other) for one, other in sums[96:]]


def ask(one: int, other: int) -> str:
    """Return a question."""
    return f"What is {one} + {other}?"


def measure_rewards(run: Path, questions: list[str]) -> list[float]:
    """Return the mean reward of the draws for each question."""
    loaded, found = open_model(str(run)), []
    torch.manual_seed(0)
    for question in questions:
        drawn = []
        for _ in range(DRAWS):
            reply = loaded.answer(question, MOST_TOKENS, 1.0)
            is_cut = reply.stopped_by == "max_tokens"
            answer = Answer(question, reply.text, None, reply.tokens, is_cut, WANTED_TOKENS)
            drawn.append(sum(weight * judge_answer(name, answer, question) for name, weight in RULES.items()))
        found.append(statistics.fmean(drawn))
    return found


def measure_seed(seed: int, **settings: float) -> tuple[dict[str, list[float]], int]:
    """Run the chain; return the reward of each held-out question after each stage, and the number of pairs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = write_files(folder, seed, **settings)
        done = run_chain(load_chain(folder / "chain.yaml", [f"output={folder / 'out'}"]))
        pairs = next(stage.result["rows"] for stage in done.stages if stage.name == "pairs")
        return {stage: measure_rewards(folder / "out" / stage, questions) for stage in STAGES}, pairs


def describe_seed(seed: int, rewards: dict[str, list[float]], pairs: int) -> str:
    """Return a row of the table; the standard error is that of the paired differences of the questions."""
    gains = [after - before for before, after in zip(rewards["sft"], rewards["dpo"], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    means = " | ".join(f"{statistics.fmean(rewards[stage]):.3f}" for stage in STAGES)
    return f"| {seed} | {pairs} | {means} | {statistics.fmean(gains):+.3f} ± {error:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    busy = time.process_time()
    lines, gains = [], []
    for seed in range(1, arguments.seeds + 1):
        rewards, pairs = measure_seed(seed)
        lines.append(describe_seed(seed, rewards, pairs))
        gains.append(statistics.fmean(rewards["dpo"]) - statistics.fmean(rewards["sft"]))
        print(lines[-1], flush=True)
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    text = (
        f"{platform.machine()}, Python {platform.python_version()}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs.\n\n"
        "The mean reward of 48 held-out questions, {DRAWS} draws each; the most is 1.5. Errors are standard errors, in the rows over the "
        "questions, below the table over the seeds.\n\n"
        "| seed | pairs | after SFT | after DPO | DPO's gain |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nGain over {len(gains)} seeds: {statistics.fmean(gains):+.3f} ± {error:.3f}. "
        f"{(time.process_time() - busy) / len(gains):.0f} s of CPU a seed.\n"
    )
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
