"""What a model does with texts, compared with transformers' own hidden states, attentions and loss."""

import json
from functools import partial

import pytest
import torch

from finetune.errors import DataError
from finetune.growth.activity import SourcedText, measure_activity, read_texts
from finetune.models.opening import open_model

TEXTS = [
    SourcedText("web", "In the morning Anna went to the market with a red basket, and bought nine apples there."),
    SourcedText("code", "def add(number):\n    return number + 2\n"),
    SourcedText("web", "a"),
]


def keep(watched, number, module, arguments, output):
    watched[number] = output


@pytest.mark.parametrize("name", ["llama", "native run"])
def test_activity_is_that_of_transformers(name, nano, train):
    if name == "llama":
        opened = str(nano)
    else:
        opened = str(train("run", "model.architecture=native", "adapter={kind: none}", "trainer.max_steps=1"))
    found = measure_activity(open_model(opened), TEXTS)
    loaded = open_model(opened)
    loaded.model.set_attn_implementation("eager")
    rms, entropies, spreads, losses = [], [], [], []
    for text in TEXTS:
        ids = torch.tensor([loaded.tokenizer.encode(text.text)])
        watched = {}
        for number, layer in enumerate(loaded.model.model.layers):
            layer.register_forward_hook(partial(keep, watched, number))
        with torch.inference_mode():
            output = loaded.model(input_ids=ids, output_attentions=True)
        rms.append([watched[number][0].square().mean(-1).sqrt() for number in range(len(watched))])
        for attention in output.attentions:
            shares = attention[0]
            assert shares.sum(-1) == pytest.approx(torch.ones(shares.shape[:2]), abs=1e-5)
        plain = [-(one[0] * (one[0] + 1e-30).log()).sum(-1).mean(0)[1:] for one in output.attentions]
        entropies.append(plain)
        spreads.append([one / torch.arange(2, len(one) + 2).log() for one in plain])
        losses.append(-output.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    for number, layer in enumerate(found["layers"]):
        assert layer["activation_rms"] == pytest.approx(float(torch.cat([one[number] for one in rms]).mean()), rel=1e-4)
        assert layer["attention_entropy"] == pytest.approx(
            float(torch.cat([one[number] for one in entropies]).mean()), rel=1e-4
        )
        assert layer["attention_spread"] == pytest.approx(
            float(torch.cat([one[number] for one in spreads]).mean()), rel=1e-4
        )
    assert found["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert found["tokens"] == sum(map(len, losses))
    assert found["sources"]["code"]["loss"] == pytest.approx(float(losses[1].mean()), rel=1e-4)
    assert sum(one["tokens"] for one in found["sources"].values()) == found["tokens"]
    # The token at position 2 and 3 is predicted at 1 and 2.
    both = torch.cat([one[1:3] for one in losses])
    assert found["positions"]["2"] == {"loss": pytest.approx(float(both.mean()), rel=1e-4), "tokens": len(both)}
    assert sum(one["tokens"] for one in found["positions"].values()) == found["tokens"]


def test_texts_come_from_files_with_their_sources(tmp_path):
    rows = [{"text": f"text {number}"} for number in range(40)]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mixed.jsonl").write_text('{"text": "a b", "source": "books"}\n{"text": "c d"}\n')
    texts = read_texts([tmp_path / "web.jsonl", tmp_path / "mixed.jsonl"])
    assert [text.source for text in texts] == ["web"] * 16 + ["books", "mixed"]
    assert texts[15].text == "text 15"
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"chat.jsonl, line 1: has no text in text; .* found messages"):
        read_texts([tmp_path / "chat.jsonl"])


def test_texts_without_a_second_token_are_refused(nano_llama):
    loaded = open_model(str(nano_llama))
    loaded.tokenizer.add_bos_token = False
    with pytest.raises(DataError, match="no text has two tokens"):
        measure_activity(loaded, [])


@pytest.mark.parametrize(
    ("overrides", "streams"),
    [
        (["adapter.train_tokens=[104]", "trainer.learning_rate=1e-2"], True),
        (["model.architecture=native", "adapter={kind: none}"], True),
        (["model.quantize=nf4"], False),  # is as small in memory, and its products are not those of float32
    ],
)
def test_a_model_whose_matrices_stay_on_the_disk_has_the_same_activity_to_the_bit(train, overrides, streams):
    run = str(train("run", "trainer.max_steps=1", *overrides))
    streamed = open_model(run, streams=True)
    placeholders = [
        weights for weights in streamed.model.parameters() if weights.dim() == 2 and not any(weights.stride())
    ]
    assert bool(placeholders) == streams
    assert measure_activity(streamed, TEXTS) == measure_activity(open_model(run), TEXTS)


def test_a_checkpoint_whose_matrices_stay_on_the_disk_has_the_same_activity_to_the_bit(nano):
    assert measure_activity(open_model(str(nano), streams=True), TEXTS) == measure_activity(
        open_model(str(nano)), TEXTS
    )
