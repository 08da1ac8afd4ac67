"""Adapters that PEFT writes in every variant, made by the scripts of `../shared/cases/adapters`: exported as PEFT applies them, or refused
by the real reason.

A few of the first script's adapters are made; `FINETUNE_ALL_CASES=1` makes all of them, and compares every export inside too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from added_tokens import fill_table
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.errors import FinetuneError
from finetune.exporting.merge import export_result
from finetune.exporting.verify import LogitVerifier
from finetune.runs.export_settings import ExportSettings
from finetune.runs.results import open_result
from finetune.yulan.folding import fold_checkpoint

# PEFT's own warnings: about tied tables and unknown keys, and about a key of rank_pattern that names no layer.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
MAKES_ALL = os.environ.get("FINETUNE_ALL_CASES") == "1"
TOKENS = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(3))
FEW = [
    "plain",
    "rank_pattern",
    "rslora",
    "dora",
    "lora_bias",
    "bias_all",
    "bias_lora_only",
    "mts_both_tied",
    "mts_embed_tied",
    "mts_head_tied",
    "mts_embed_tied_ensure",
    "tokens_tied",
    "tokens_dict_tied",
    "head_untied",
    "head_tied",
    "embed_tied_nosave",
    "embed_tied_ensure",
    "embed_untied",
    "target_params",
    "mica",
    "layer_repl",
    "alora",
    "pissa_raw",
    "fan_in_fan_out",
]
MERGED_ONCE = (
    "plain",
    "rslora",
    "rank_pattern",
    "lora_bias",
    "target_params",
    "fan_in_fan_out",
    "dt_f16",
    "two_adapters",
    "k14_mixed",
)
NOT_LORA = "peft_type is .*; only LORA adapters can be used"
CHANGES_BASE = "changes the base before training"
REFUSED = {
    "alora": "uses alora_invocation_tokens, which",
    "qalora": "uses use_qalora, which",
    "layer_repl": "uses layer_replication, which",
    "pissa_raw": CHANGES_BASE,
    "olora_raw": CHANGES_BASE,
    "corda_raw": CHANGES_BASE,
    "rank_pattern_overlap": r"its A has rank 4, adapter_config.json says 6",
    "base_absent": "names no base model .*--base-model",
    "base_null": "names no base model .*--base-model",
    "base_empty": "names no base model .*--base-model",
    "base_list": "names no base model .*--base-model",
    "base_gone": r"its base model '/home/somebody/models/llama' cannot be used(.|\n)*--base-model",
    "base_hub": r"its base model 'unsloth/.*' cannot be used(.|\n)*--base-model",
    "base_hub_one_word": r"its base model 'gpt2' cannot be used(.|\n)*--base-model",
    "base_windows": r"its base model .* cannot be used(.|\n)*--base-model",
    "base_is_adapter": "holds no config.json, so it is not a checkpoint",
    "base_wrong_size": "does not fit the base",
    "base_nano_alias": "does not fit the base",
    "unsloth_conf": "target_modules .* names none of the base's layers",
    "no_alpha": "lora_alpha is None",
    "alpha_string": "lora_alpha is '16'",
    "rank_pattern_list": r"rank_pattern is \['q_proj'\]; expected an object",
    "rank_pattern_badregex": "which is no regular expression",
    "alpha_pattern_string": "alpha_pattern gives 'q_proj' the value 'x'",
    "peft_type_lower": NOT_LORA,
    "peft_type_absent": NOT_LORA,
    "orig_mod": "42 tensors have names under which PEFT loads nothing",
    "default_names": "42 tensors have names under which PEFT loads nothing",
    "no_prefix": "42 tensors have names under which PEFT loads nothing",
    "bin": "only safetensors are read",
    "empty_conf": "is not valid JSON",
    "conf_only": "holds no adapter_model.safetensors",
    "weights_only": "the adapter_config.json that PEFT writes beside it is missing",
    "only_weights_dir": "the adapter_config.json that PEFT writes beside it is missing",
    "empty_dir": "is neither a run directory nor an adapter folder",
    "truncated": "is truncated or damaged",
    "zero_bytes": "is not a safetensors file",
    "zero3_empty": "42 tensors are empty .*shards were not gathered",
    "dt_fp8": "has the type F8_E4M3",
    "nan": "holds NaN or infinite values",
    "drop_b": "has LoRA's A without its B",
    "drop_layer": "7 of the 21 layers that adapter_config.json names have no tensors",
    "dora_flag_removed": "its lora_magnitude_vector is missing",
    "symlinked_files": r"adapter_config.json: is a link to .*/ad/plain/adapter_config.json, out of its folder",
    "mlx": "was written by mlx-lm",
    "seq_cls": "task_type is 'SEQ_CLS'",
    "feature_extraction": "task_type is 'FEATURE_EXTRACTION'",
    "named_only": "give one of them: chat",
    "weighted_cat": "give one of them: c",
    "weighted_linear": "give one of them: c",
    "weighted_svd": "give one of them: c",
    "k6_tokenizer_grew": "its tokenizer has 2 tokens beyond the 1,312 rows",
    "k11_bin_base": "holds only pickled weights",
    "k13_mistral": "model_type is 'mistral'",
    "k18_base_without_prefix": r"the tensors do not fit config.json: 1 missing \(lm_head.weight\);",
    **{
        f"t_{name}": NOT_LORA
        for name in [
            "ia3",
            "loha",
            "lokr",
            "oft",
            "boft",
            "vera",
            "fourier",
            "adalora",
            "prefix",
            "prompt",
            "trainable_tokens",
            "ln",
        ]
    },
}


@pytest.fixture
def make(shared, nano, tmp_path, monkeypatch):
    """Return a function that runs the scripts, and gives the folders with adapters that they made."""
    scripts = shared / "cases" / "adapters"
    if not scripts.is_dir():
        pytest.skip("the scripts are not there")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases").mkdir()
    fold_checkpoint(nano, tmp_path / "bases" / "nano")
    # The scripts add tokens, which are to lie beyond the table, and save the tokenizer with transformers, which drops `legacy: true`.
    fill_table(tmp_path / "bases" / "nano", 1312)
    settings = tmp_path / "bases" / "nano" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    del content["legacy"]
    settings.write_text(json.dumps(content))

    def run(*commands):
        for command in (["make_bases.py"], *commands):
            script = [sys.executable, str(scripts / command[0]), *command[1:]]
            done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        folders = [path for name in ("ad", "ad2", "ad3") for path in sorted((tmp_path / name).glob("[!_]*"))]
        return [folder for folder in folders if folder.is_dir()]

    return run


def compare(folder, export):
    """Compare an export with PEFT's live model; the tables of its base are enlarged first where the adapter's are."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("rank_pattern", {}) is None:
        return  # PEFT itself fails on it
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    if (rows := model.config.vocab_size) > base.config.vocab_size:
        base.resize_token_embeddings(rows, mean_resizing=False)
    live = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found, expected = (one(input_ids=TOKENS, use_cache=False).logits for one in (model.eval(), live))
    assert (found - expected).abs().max() < 1e-4
    if folder.name in MERGED_ONCE:
        merged = live.merge_and_unload().state_dict()
        written = load_file(export / "model.safetensors")
        assert all(torch.equal(tensor, merged[name].float()) for name, tensor in written.items())


def check_all(folders, tmp_path):
    for folder in folders:
        export = tmp_path / "exports" / folder.name
        try:
            verifier = LogitVerifier() if MAKES_ALL else None
            export_result(open_result(folder), export, ExportSettings("float32"), verifier)
        except FinetuneError as error:
            assert folder.name in REFUSED, str(error)
            assert re.search(REFUSED[folder.name], str(error)), (folder.name, str(error))
            assert not export.exists()
            continue
        assert folder.name not in REFUSED, f"{folder.name} was exported"
        compare(folder, export)


def test_variants_of_lora(make, tmp_path):
    folders = make(["make_adapters.py", *(() if MAKES_ALL else FEW)])
    assert {folder.name for folder in folders} >= set(FEW)
    check_all(folders, tmp_path)


def test_other_kinds_and_folders_of_other_tools(make, tmp_path):
    folders = [
        folder for folder in make(["make_adapters.py", "plain"], ["make_adapters2.py"]) if folder.parent.name == "ad2"
    ]
    assert len(folders) > 60
    check_all(folders, tmp_path)


def test_bases_of_other_kinds(make, tmp_path):
    folders = make(["make_k.py"])
    assert len(folders) > 20
    check_all(folders, tmp_path)
    exports = tmp_path / "exports"
    templates = {
        name: (exports / name / "chat_template.jinja").read_text()
        for name in ("k5_chatml_template", "k5c_adapter_template")
    }
    assert all(text.startswith("{% for m in messages %}{{ m") or "<|im_start|>" in text for text in templates.values())
    assert "[INST]" in (exports / "k5d_adapter_only_jinja" / "chat_template.jinja").read_text()
    assert not list((exports / "k4_no_tokenizer").glob("tokenizer*"))
    settings = json.loads((exports / "k21_generation_config" / "generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"], settings["repetition_penalty"]) == (0.6, 0.9, 1.1)
    assert (exports / "k21_generation_config" / "LICENSE").read_text() == "Llama licence"
    assert json.loads((exports / "k7_resized" / "config.json").read_text())["vocab_size"] == 1540
    assert Path(exports / "k7_resized" / "tokenizer.json").is_file()
