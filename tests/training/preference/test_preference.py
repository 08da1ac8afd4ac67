"""Preference methods: their losses are the papers' formulas, their reference is the start, an adapter goes on from run to run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from finetune.check.recipes import load_recipe
from finetune.errors import RecipeError
from finetune.evaluation.pairs import evaluate_pairs
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.files.resources import find_demo_data
from finetune.models.lora import attach_adapter
from finetune.models.opening import open_model
from finetune.models.precision import Precision
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.training.preference.watch import PreferenceWatch
from finetune.training.trainer import build_trainer
from finetune.training.training_rows import prepare_rows

FLOAT32 = Precision(torch.float32, "no")
BETA = 0.3
# Log-probabilities of the answers' tokens: two pairs of answers of three and two tokens.
CHOSEN, REJECTED = [[-0.7, -1.9, -0.2], [-2.5, -0.1, -0.3]], [[-1.1, -0.4], [-0.9, -3.0]]
REF_CHOSEN, REF_REJECTED = [-3.1, -2.2], [-1.2, -4.4]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def make_trainer(make_pairs_recipe):
    """Return a function that builds a method's trainer on a model that is too small to matter."""

    def make(method, **options):
        recipe = make_pairs_recipe("unused", method, *(f"trainer.{key}={value}" for key, value in options.items()))
        tokenizer, splits = prepare_rows(recipe)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config.pad_token_id, config.num_labels = tokenizer.pad_token_id, 1
        torch.manual_seed(0)
        model = (LlamaForSequenceClassification if method == "reward" else LlamaForCausalLM)(config)
        return build_trainer(recipe, attach_adapter(model, recipe.recipe.adapter, "."), tokenizer, splits, FLOAT32)

    return make


def make_batch(answers):
    """Return a batch of one prompt token and the answers, and a model whose tokens have their log-probabilities."""
    longest = max(map(len, answers))
    mask = torch.tensor([[0] + [1] * len(a) + [0] * (longest - len(a)) for a in answers])
    log_probs = torch.tensor([[*a, *[0.0] * (longest - len(a))] for a in answers], dtype=torch.float64)
    attention = mask.clone()
    attention[:, 0] = 1
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": attention, "completion_mask": mask}
    zeros = torch.zeros_like(log_probs)
    return batch, SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def tell_dpo_loss(loss_type, chosen, rejected, lengths):
    """Return a loss of one pair; `chosen` and `rejected` are log-ratios of policy and reference, summed over tokens."""
    delta, smoothing = BETA * (chosen - rejected), 0.1
    normed = chosen / lengths[0] - rejected / lengths[1]
    right = -math.log(sigmoid(delta))
    wrong = -math.log(sigmoid(-delta))
    return {
        "sigmoid": right,
        "hinge": max(0, 1 - delta),
        "ipo": (normed - 1 / (2 * BETA)) ** 2,
        "robust": ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing),
        "exo_pair": sigmoid(delta) * (math.log(sigmoid(delta)) - math.log(1 - smoothing))
        + sigmoid(-delta) * (math.log(sigmoid(-delta)) - math.log(smoothing)),
        "nca_pair": -math.log(sigmoid(BETA * chosen))
        - 0.5 * math.log(sigmoid(-BETA * chosen))
        - 0.5 * math.log(sigmoid(-BETA * rejected)),
        "bco_pair": -math.log(sigmoid(BETA * chosen)) - math.log(sigmoid(-BETA * rejected)),
        "sppo_hard": (chosen - 0.5 / BETA) ** 2 + (rejected + 0.5 / BETA) ** 2,
        "apo_zero": 1 - sigmoid(BETA * chosen) + sigmoid(BETA * rejected),
        "apo_down": sigmoid(BETA * chosen) + 1 - sigmoid(delta),
        "sigmoid_norm": -math.log(sigmoid(BETA * normed)),
    }[loss_type]


def test_dpo_losses_are_the_formulas_of_the_papers(make_trainer):
    trainer = make_trainer("dpo", beta=BETA, label_smoothing=0.1)
    batch, outputs = make_batch([*CHOSEN, *REJECTED])
    trainer.precompute_ref_logps = True
    batch |= {
        "ref_chosen_logps": torch.tensor(REF_CHOSEN, dtype=torch.float64),
        "ref_rejected_logps": torch.tensor(REF_REJECTED, dtype=torch.float64),
    }
    names = "sigmoid hinge ipo robust exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down sigmoid_norm"
    for name in names.split():
        trainer.loss_types = [name]
        found = trainer._compute_loss(lambda **_: outputs, batch, False).item()
        expected = [
            tell_dpo_loss(name, sum(chosen) - ref_chosen, sum(rejected) - ref_rejected, (len(chosen), len(rejected)))
            for chosen, rejected, ref_chosen, ref_rejected in zip(
                CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, strict=True
            )
        ]
        assert found == pytest.approx(sum(expected) / 2, abs=1e-6), name


def test_kto_loss_is_the_formula_of_the_paper(make_trainer):
    """Source: KTO (arXiv 2402.01306), equation 7: the value of an answer against how far the model has moved."""
    trainer = make_trainer("kto", beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    batch, outputs = make_batch([*CHOSEN, *REJECTED])
    mismatched, kl_outputs = make_batch([[-1.0], [-0.2, -0.3], [-2.0], [-0.5]])
    trainer.precompute_ref_logps = True
    references, kl_references = [*REF_CHOSEN, *REF_REJECTED], [-1.5, -0.9, -2.6, -0.4]
    batch |= {f"KL_{name}": tensor for name, tensor in mismatched.items()} | {
        "label": torch.tensor([True, True, False, False]),
        "ref_logps": torch.tensor(references, dtype=torch.float64),
        "ref_KL_logps": torch.tensor(kl_references, dtype=torch.float64),
    }
    replies = iter([kl_outputs, outputs])
    found = trainer._compute_loss(lambda **_: next(replies), batch, False).item()
    sums = [sum(answer) for answer in (*CHOSEN, *REJECTED)]
    kl = max(0.0, sum(kl - ref for kl, ref in zip([-1.0, -0.5, -2.0, -0.5], kl_references, strict=True)) / 4)
    ratios = [policy - reference for policy, reference in zip(sums, references, strict=True)]
    losses = [1.5 * (1 - sigmoid(BETA * (ratio - kl))) for ratio in ratios[:2]]
    losses += [0.5 * (1 - sigmoid(BETA * (kl - ratio))) for ratio in ratios[2:]]
    assert found == pytest.approx(sum(losses) / 4, abs=1e-6)


def test_orpo_and_simpo_losses_are_the_formulas_of_the_papers(make_trainer):
    """Sources: ORPO (arXiv 2403.07691), equations 4 to 7; SimPO (arXiv 2405.14734), equation 6; means over tokens."""
    means = [[sum(answer) / len(answer) for answer in side] for side in (CHOSEN, REJECTED)]
    tensors = [torch.tensor(side, dtype=torch.float32) for side in means]
    found = make_trainer("orpo", beta=BETA).odds_ratio_loss(*tensors)[0]
    odds = [[math.exp(mean) / (1 - math.exp(mean)) for mean in side] for side in means]
    for value, chosen, rejected in zip(found.tolist(), *odds, strict=True):
        assert -value == pytest.approx(-BETA * math.log(sigmoid(math.log(chosen / rejected))), abs=1e-6)
    trainer = make_trainer("simpo", beta=BETA, simpo_gamma=0.5)
    assert (trainer.loss_type, trainer.cpo_alpha) == ("simpo", 0.0)
    for value, chosen, rejected in zip(trainer.cpo_loss(*tensors)[0].tolist(), *means, strict=True):
        assert value == pytest.approx(-math.log(sigmoid(BETA * (chosen - rejected) - 0.5)), abs=1e-6)


@pytest.mark.parametrize("method", ["orpo", "simpo", "cpo"])
def test_losses_of_whole_batches_are_the_formulas_of_the_papers(make_trainer, method):
    """Log-probabilities of each row alone, by a plain softmax: which tokens count, means and sums, and the likelihood term.

    Sources: ORPO, equations 6 and 7, with the likelihood of prompt and answer; SimPO, equation 6; CPO (arXiv 2401.08417),
    equation 5, with that of the answer.
    """
    trainer = make_trainer(method, beta=BETA, **({"simpo_gamma": 0.5} if method == "simpo" else {}))
    rows = [trainer.train_dataset[number] for number in range(2)]
    batch = trainer.data_collator(rows)
    model = trainer.model.eval()
    answers, texts = {"chosen_ids": [], "rejected_ids": []}, []
    with torch.no_grad():
        found = trainer.get_batch_loss_metrics(model, batch)[0].item()
        for row in rows:
            for side, values in answers.items():
                ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
                logs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
                tokens = logs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
                values.append(tokens[len(row["prompt_ids"]) - 1 :])
                texts += tokens if side == "chosen_ids" else []
    chosen, rejected = answers.values()
    likelihood = {"orpo": texts, "simpo": [0.0], "cpo": [token for answer in chosen for token in answer]}[method]
    expected = -sum(likelihood) / len(likelihood)
    for one, other in zip(chosen, rejected, strict=True):
        if method == "cpo":
            preference = math.log(sigmoid(BETA * (sum(one) - sum(other))))
        elif method == "simpo":
            preference = math.log(sigmoid(BETA * (sum(one) / len(one) - sum(other) / len(other)) - 0.5))
        else:
            odds = [math.exp(sum(a) / len(a)) / (1 - math.exp(sum(a) / len(a))) for a in (one, other)]
            preference = BETA * math.log(sigmoid(math.log(odds[0] / odds[1])))
        expected -= preference / 2
    assert found == pytest.approx(expected, abs=1e-5)


def test_batches_hold_our_token_ids(make_trainer):
    """No trainer tokenizes again: what it reads are prompt and answers as they were prepared."""
    rows = {}
    for method in ("dpo", "orpo", "simpo", "reward"):
        trainer = make_trainer(method)
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
        rows[method] = trainer.train_dataset[:2]
        sides = [
            [*prompt, *answer]
            for name in ("chosen_ids", "rejected_ids")
            for prompt, answer in zip(rows[method]["prompt_ids"], rows[method][name], strict=True)
        ]
        if method in ("orpo", "simpo"):
            found = [*batch["chosen_input_ids"].tolist(), *batch["rejected_input_ids"].tolist()]
        else:
            found = batch["input_ids"].tolist()
        pad = trainer.processing_class.pad_token_id
        assert [[token for token in row if token != pad] for row in found] == sides
    trainer = make_trainer("kto")
    chosen = [trainer.train_dataset[number] for number in range(3)]
    batch = trainer.data_collator(chosen)
    length = batch["KL_attention_mask"][0].sum()
    assert batch["KL_input_ids"][0, :length].tolist() == chosen[0]["prompt_ids"] + chosen[2]["completion_ids"]
    assert batch["label"].tolist() == [row["label"] for row in chosen]


def read_lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_dpo_starts_at_ln_2_from_a_fresh_adapter(make_pairs_recipe, tmp_path):
    from finetune.training.run import run_training

    run_training(make_pairs_recipe("fresh", "dpo", "trainer.max_steps=1", "trainer.num_train_epochs=1"))
    first = read_lines(tmp_path / "fresh")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0


def test_dpo_starts_at_ln_2_from_a_continued_adapter(chain):
    first = read_lines(chain / "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert read_lines(chain / "dpo")[1]["rewards/margins"] != 0


def test_the_reference_of_a_continued_adapter_is_the_earlier_run(chain, monkeypatch):
    """TRL 1.16 leaves trained token rows out of its frozen copy, so the reference would be another model."""
    from finetune.models.loading import load_base
    from finetune.models.lora import continue_adapter
    from finetune.runs.lineage import find_training_base

    recipe = load_recipe(chain / "dpo.yaml", [f"output={chain / 'again'}"])
    tokenizer, splits = prepare_rows(recipe)
    base = load_base(find_training_base(recipe), recipe.recipe.model, FLOAT32, torch.device("cpu"))
    trainer = build_trainer(
        recipe, continue_adapter(base, recipe.recipe.adapter, recipe.adapter_folder), tokenizer, splits, FLOAT32
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():  # training moves the adapter; its frozen copy stays
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    found = [side.item() for side in trainer.compute_ref_log_probs(trainer.model, batch)]
    row, earlier = trainer.train_dataset[0], open_model(str(chain / "sft"))
    for value, side in zip(found, ("chosen_ids", "rejected_ids"), strict=True):
        ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
        with torch.no_grad():
            logits = earlier.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        start = len(row["prompt_ids"]) - 1
        expected = logits[start:].gather(-1, ids[0, start + 1 :, None]).sum().item()
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_chain_is_one_adapter_and_merged_once(chain, tmp_path):
    result = open_result(chain / "kto")
    assert result.lineage.describe_chain() == "nano → sft → dpo → kto"
    assert [stage.run for stage in result.lineage.earlier] == [str(chain / "sft"), str(chain / "dpo")]
    assert result.lineage.base == open_result(chain / "sft").lineage.base
    settings = ExportSettings("auto", "2GB")
    report = export_result(result, tmp_path / "export", settings, LogitVerifier())
    assert report.verify.max_abs <= 1e-4
    assert "| chain | nano → sft → dpo → kto |" in (tmp_path / "export" / "README.md").read_text()
    assert json.loads((tmp_path / "export" / "export.json").read_text())["origin"]["earlier"][0]["method"] == "sft"


def test_pairs_are_evaluated_in_plain_numbers(chain):
    scores = evaluate_pairs(str(chain / "dpo"), [find_demo_data("pairs.jsonl")], 256)
    assert scores.pairs == 120
    assert 0 <= scores.accuracy <= 1
    assert scores.loss > 0


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("adapter.rank=8", "adapter.rank: "),
        ("model.quantize=nf4", "model.quantize: "),
        ("adapter.targets=all-linear", "adapter.targets: "),
        ("adapter.init=pissa", "adapter.init: has no effect, as this run continues the adapter of "),
        ("adapter.kind=none", "adapter.kind: "),
        (
            "trainer.precompute_ref_log_probs=true",
            "trainer.precompute_ref_log_probs: TRL computes these before it knows",
        ),
        ("trainer.loss_type=sigmiod", "trainer.loss_type: 'sigmiod' is unknown; did you mean 'sigmoid'?"),
        ("trainer.loss_type=[sigmoid, sfd]", "trainer.loss_type: 'sfd' is unknown"),
        ("trainer.sync_ref_model=true", "trainer.sync_ref_model: the reference model stays as it is before step 1"),
        ("data.train_on=all", "data.train_on: dpo always trains on whole answers"),
        ("data.format=alpaca", "data.format: holds rows of the format alpaca"),
    ],
)
def test_what_does_not_fit_an_earlier_run_is_told(chain, override, problem):
    with pytest.raises(RecipeError) as caught:
        load_recipe(chain / "dpo.yaml", [override])
    assert [found[: len(problem)] for found in caught.value.problems] == [problem]


def test_an_earlier_run_settles_the_adapter(chain):
    recipe = load_recipe(chain / "dpo.yaml")
    assert (recipe.recipe.adapter.rank, recipe.recipe.adapter.targets) == (4, ("q_proj", "v_proj"))
    assert recipe.recipe.adapter.train_tokens == (104, 106)
    # The recipe that a run writes names all of them, and is the same recipe.
    assert load_recipe(chain / "dpo" / "recipe.yaml") == recipe


def test_without_an_adapter_the_reference_is_computed_once(make_pairs_recipe):
    full = ("adapter={kind: none}",)
    assert make_pairs_recipe("full", "dpo", *full).recipe.trainer["precompute_ref_log_probs"] is True
    with pytest.raises(RecipeError, match="would need a second copy of all weights as the reference model"):
        make_pairs_recipe("full", "dpo", *full, "trainer.precompute_ref_log_probs=false")
    with pytest.raises(RecipeError, match="kto compares the answers of one micro-batch; set at least 2; found 1"):
        make_pairs_recipe("kto", "kto", "trainer.per_device_train_batch_size=1")


def test_accumulated_steps_have_the_same_losses(make_pairs_recipe, tmp_path):
    from finetune.training.run import run_training

    losses = []
    for name, size in (("whole", 8), ("single", 1)):
        sizes = (f"trainer.per_device_train_batch_size={size}", f"trainer.gradient_accumulation_steps={8 // size}")
        run_training(make_pairs_recipe(name, "dpo", *sizes, "trainer.max_steps=3"))
        losses.append([line["loss"] for line in read_lines(tmp_path / name) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] != losses[0][2]


def log_steps(watch, logs, beta=0.1, loss_type=None):
    for step, line in enumerate(logs):
        watch.on_log(
            SimpleNamespace(beta=beta, loss_type=loss_type), SimpleNamespace(global_step=step), None, logs=line
        )


def test_a_collapse_is_told_once_and_in_plain_words(caplog):
    log_steps(PreferenceWatch(True), [{"rewards/chosen": -1.0, "rewards/margins": 5.0}] * 5)
    assert not caplog.records
    log_steps(PreferenceWatch(True), [{"rewards/chosen": -3.0, "rewards/margins": 25.0}] * 5)
    assert len(caplog.records) == 2
    assert "step 2: the chosen answers have become unlikely, by 30 nats an answer" in caplog.text
    assert "the rewards of chosen and rejected answers are 25 apart" in caplog.text


def test_without_a_reference_a_collapse_is_seen_against_the_first_log(caplog):
    log_steps(PreferenceWatch(False), [{"logps/chosen": -2.0}] + [{"logps/chosen": -2.5}] * 3)
    assert not caplog.records
    log_steps(PreferenceWatch(False), [{"logps/chosen": -2.0}] + [{"logps/chosen": -3.5}] * 3)
    assert "by 1.5 nats a token" in caplog.text


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_cpo_may_lose_more_where_it_sums_over_an_answer(caplog, loss_type):
    """A whole answer that was a nat less likely was told as a collapse by a nat a token."""
    log_steps(PreferenceWatch(False), [{"logps/chosen": -40.0}] + [{"logps/chosen": -59.0}] * 3, loss_type=loss_type)
    assert not caplog.records
    log_steps(PreferenceWatch(False), [{"logps/chosen": -40.0}] + [{"logps/chosen": -61.0}] * 3, loss_type=loss_type)
    assert "by 21 nats an answer" in caplog.text
