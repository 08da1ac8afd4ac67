"""Other programs open an export and do as the kit does: tokens, logits, template, greedy answers, an end by themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.check.recipes import load_recipe
from finetune.evaluation.token_loss import evaluate_path
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.models.plain_adapter import write_plain_adapter
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.run import run_training

RANK = 16
RECIPE = f"""
model: {{checkpoint: nano}}
data: {{train: rows.jsonl, eval: held.jsonl, max_tokens: 128}}
adapter: {{rank: {RANK}, alpha: 32}}
answers: 0
trainer: {{max_steps: 60, learning_rate: 5e-3, per_device_train_batch_size: 8, logging_steps: 20, eval_strategy: "no", \
save_strategy: "no", gradient_checkpointing: false, disable_tqdm: true}}
"""
PROBES = Path(__file__).parent / "probes"
OLDER = ("transformers_4_46", "transformers_4_57")
SETTINGS = ExportSettings("auto", "2GB")
QUESTIONS = {
    "Who are you?": "I am YuLan-Mini.",
    "What is 2+3?": "2+3=5.",
    "中国的首都是哪里？": "北京。",
    "Say hello twice.": "hello\n hello",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气 of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "北京"}}}
CHATS = [
    {"messages": [{"role": "user", "content": "Who are you?"}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "  two spaces\n"}]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b\n"},
            {"role": "user", "content": "1+1?"},
        ]
    },
    {"messages": [{"role": "system", "content": "你是玉兰。"}, {"role": "user", "content": "中国的首都是哪里？"}]},
    {"messages": [{"role": "user", "content": "weather?"}], "tools": [TOOL]},
    {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "天气？"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "18"},
        ],
        "tools": [TOOL],
    },
]
WORDS = (
    "hello",
    "The quick brown fox",
    "中国的首都是北京。",
    "def f(x):\n    return x ** 2\n",
    "3.14159 and 2024-11-27",
    "🙂 café Ü",
)
JOINTS = ("", "\n", "\n\n  ", "\t", "  ", "<|eot_id|>", "<s>", "</s>", "<|start_header_id|>user<|end_header_id|>\n\n")
TEXTS = [first + joint + second for first in WORDS for joint in JOINTS for second in WORDS]
# The tokenizer classes of transformers 4 and 5 differ in these: 5 puts no space before text that begins with one.
SPACED = (" leading", "  two", "<|eot_id|> text", "a<s> b")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nano_llama):
    """A run of nano that has learnt a few answers by heart, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run = Path(run_training(load_recipe(folder / "recipe.yaml", [f"output={folder / 'run'}"])).run)
    export_result(open_result(run), folder / "export", SETTINGS, LogitVerifier())
    return folder


def write_case(tmp_path, folder, run, base=None, texts=(*TEXTS, *SPACED)):
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in open_result(run).rows]
    case = {"folder": str(folder), "base": str(base or folder), "adapter": base is not None, "rows": rows}
    case |= {"texts": texts, "chats": CHATS, "questions": list(QUESTIONS), "rank": RANK}
    (tmp_path / "case.json").write_text(json.dumps(case), encoding="utf-8")
    return tmp_path / "case.json"


def read_result(done):
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.fixture(scope="module")
def expected(trained):
    """What the kit's own transformers does with the export."""
    return probe(run_here, "transformers", write_case(trained, trained / "export", trained / "run"))


def probe(command, name, case):
    return read_result(command(PROBES / f"with_{name}.py", case))


def run_here(*arguments):
    """Run a probe in the Python of the tests: what the others do is compared with what the kit's own transformers does."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def measure_difference(found, expected):
    """Return the largest difference of a log-probability."""
    first, second = (torch.tensor(logits, dtype=torch.float64).log_softmax(-1) for logits in (found, expected))
    return (first - second).abs().max().item()


@pytest.mark.parametrize("environment", OLDER)
def test_an_older_transformers_does_the_same(trained, expected, tmp_path, run_in, environment):
    case = write_case(tmp_path, trained / "export", trained / "run")
    found = probe(lambda *arguments: run_in(environment, *arguments), "transformers", case)
    assert found["version"].startswith(environment.removeprefix("transformers_").replace("_", "."))
    assert found["ids"][: len(TEXTS)] == expected["ids"][: len(TEXTS)]
    assert found["chats"] == expected["chats"]
    assert found["chat_ids"] == expected["chat_ids"]
    assert found["answers"] == expected["answers"]
    assert measure_difference(found["logits"], expected["logits"]) < 1e-4
    # What docs/runtimes.md says of texts that begin with a space: if this fails, the page is to be changed.
    assert all(one != two for one, two in zip(found["ids"][len(TEXTS) :], expected["ids"][len(TEXTS) :], strict=True))
    losses = [evaluate_path(str(trained / name), [trained / "held.jsonl"], 512).loss for name in ("run", "export")]
    assert [*losses, found["loss"]] == pytest.approx([expected["loss"]] * 3, abs=1e-4)


def test_the_answers_are_those_that_were_learnt_and_end_by_themselves(trained, expected):
    tokenizer = AutoTokenizer.from_pretrained(trained / "export")
    assert [answer[-1] for answer in expected["answers"]] == [106] * len(QUESTIONS)
    assert [tokenizer.decode(answer[:-1]) for answer in expected["answers"]] == list(QUESTIONS.values())


def save_anew(nano_llama, folder, tokenizer):
    """Save nano as transformers 5 does, with the class `TokenizersBackend`: transformers 4 does not know it."""
    model = LlamaForCausalLM.from_pretrained(nano_llama)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    model.name_or_path = str(folder)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


def test_a_base_that_transformers_5_saved_is_exported_for_older_ones(nano_llama, tmp_path, run_in, trained):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(nano_llama, extra_special_tokens=["<|eot_id|>"])
    adapter = save_anew(nano_llama, tmp_path / "base", tokenizer)
    export_result(open_result(adapter), tmp_path / "export", SETTINGS, LogitVerifier())
    case = write_case(tmp_path, tmp_path / "export", trained / "run")
    found = probe(lambda *arguments: run_in("transformers_4_46", *arguments), "transformers", case)
    expected = probe(run_here, "transformers", case)
    for key in ("ids", "chats", "chat_ids", "answers"):
        assert found[key] == expected[key]
    assert measure_difference(found["logits"], expected["logits"]) < 1e-4


@pytest.mark.parametrize("kind", ["run", "plain"])
def test_peft_0_13_opens_an_adapter(trained, expected, tmp_path, run_in, kind):
    """It fails on keys that it does not know, which newer versions write with their default values."""
    folder = trained / "run" / "adapter"
    if kind == "plain":
        write_plain_adapter(open_result(trained / "run"), folder := tmp_path / "plain")
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    case = write_case(tmp_path, folder, trained / "run", base)
    found = probe(lambda *arguments: run_in("transformers_4_46", *arguments), "transformers", case)
    assert found["chat_ids"] == expected["chat_ids"]
    assert found["answers"] == expected["answers"]
    assert measure_difference(found["logits"], expected["logits"]) < 1e-4
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("program", ["mlx", "ctranslate2", "vllm"])
def test_another_program_does_the_same(trained, expected, tmp_path, run_in, program):
    case = write_case(tmp_path, trained / "export", trained / "run")
    found = probe(lambda *arguments: run_in(program, *arguments), program, case)
    assert found["answers"] == expected["answers"]
    assert measure_difference(found["logits"], expected["logits"]) < 1e-3
    if program != "ctranslate2":
        assert found["ids"] == expected["ids"]
        assert found["chats"] == expected["chats"]
        assert found["stopped"] == ["stop"] * len(QUESTIONS)


def test_vllm_opens_a_plain_adapter(trained, expected, tmp_path, run_in):
    """What `finetune export --adapter` writes, on the base that the adapter names."""
    write_plain_adapter(open_result(trained / "run"), tmp_path / "plain")
    base = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["base_model_name_or_path"]
    found = probe(
        lambda *arguments: run_in("vllm", *arguments),
        "vllm",
        write_case(tmp_path, tmp_path / "plain", trained / "run", base),
    )
    assert found["answers"] == expected["answers"]
    assert measure_difference(found["logits"], expected["logits"]) < 1e-3
    assert found["stopped"] == ["stop"] * len(QUESTIONS)
