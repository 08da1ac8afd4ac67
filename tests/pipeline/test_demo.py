"""The demo, shortened: what it returns, and that its summary says it."""

import math

from finetune.pipeline.demo import describe_demo, run_demo
from finetune.yulan.nano import CONFIG


def test_the_demo_goes_all_the_way(tmp_path):
    result = run_demo(tmp_path / "demo", ["trainer.max_steps=30", "trainer.disable_tqdm=true"])
    assert result.loss_after < 0.7 * result.loss_before
    assert result.verify["max_abs"] <= 1e-4
    assert result.verify["top1_agreement"] == 1.0
    assert result.verify["rows"] == 18  # of 40 that are bundled, those of the first 512 tokens
    assert len(result.answers) == 3
    text = describe_demo(result)
    assert f"before {result.loss_before:.3f}   after {result.loss_after:.3f}" in text
    assert f"finetune chat {tmp_path / 'demo' / 'export'}" in text
    assert not any(name in text for name in ("vLLM", "SGLang", "llama.cpp", "Ollama"))  # no test has shown it
    for folder in ("run", "export"):
        assert str(tmp_path / "demo" / folder) in text
    # A random network on rows it never saw. An equal guess among all rows of the table costs ln(rows), and being sure of wrong tokens
    # costs more, at most the largest logit: the last state has the length sqrt(width), and a row of the head about 1. Most of it
    # goes to the token just read, since the head is the embedding: six seeds gave 8.4 to 13.1, and nano's was chosen for a low one.
    excess = result.loss_before - math.log(CONFIG["vocab_size"])
    assert 0 < excess < math.sqrt(CONFIG["hidden_size"])
