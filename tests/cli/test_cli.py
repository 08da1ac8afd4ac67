"""The command line as a person uses it: exit codes, one clear message, clean standard output, nothing half-written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.cli.main import main
from finetune.files.resources import find_demo_data

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
RECIPE = """
model: {checkpoint: nano}
data: {train: rows.jsonl, held_out: 4, max_tokens: 128}
adapter: {rank: 2}
trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, disable_tqdm: true}
output: run
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a small recipe and twenty rows."""
    monkeypatch.chdir(tmp_path)
    rows = find_demo_data("demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def call(capsys):
    """Return a function that runs one verb and gives its exit status, standard output and standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run


@pytest.mark.parametrize("phase", [None, 26])
def test_mixtures(call, phase):
    arguments = [] if phase is None else ["--phase", phase]
    status, out, _ = call("mixtures", "--json", *arguments)
    result = json.loads(out)
    assert status == 0 and len(result) == (28 if phase is None else 2)
    assert {"phase", "context", "total", "shares", "categories"} <= set(result[0])
    assert all(sum(mixture["shares"].values()) == pytest.approx(1) for mixture in result)
    text = call("mixtures", *arguments)[1]
    assert "phase26-4k" in text and "48.5%" in text
    assert ("fineweb-edu" in text) == (phase == 26)


def test_mixtures_list_the_open_datasets(call):
    assert {"name": "fineweb-edu", "url": "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu"} in json.loads(
        call("mixtures", "--datasets", "--json")[1]
    )
    assert len(call("mixtures", "--datasets")[1].splitlines()) == 91


@pytest.mark.parametrize("name", ["new/plot.png", "plot.svg"])
def test_mixtures_are_drawn(call, folder, name):
    status, _, err = call("mixtures", "--plot", folder / name)
    assert status == 0 and err == f"wrote {folder / name}\n"
    assert (folder / name).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--phase", "28"], "must be a phase from 1 to 27; found '28'"),
        (["--plot", "plot.gif"], "plot.gif: must be a file that ends in .png, .svg, .pdf"),
        (["--plot", "rows.jsonl/plot.png"], "cannot be written: "),
    ],
)
def test_mixtures_refuse(call, folder, arguments, sentence):
    before = list_files(folder)
    status, out, err = call("mixtures", *arguments)
    assert (status, out) == (2, "") and sentence in err and "Traceback" not in err
    assert list_files(folder) == before


def test_a_recipe_takes_files_in_the_proportions_of_a_phase(call, folder):
    text = RECIPE.replace("train: rows.jsonl", "mixture: phase27, sources: {web: rows.jsonl, chinese: more.jsonl}")
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    (folder / "more.jsonl").write_text((folder / "rows.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    sentence = (
        "mixture phase27: your sources stand for 48.0% of its tokens; scaled to 100%, by text: web 79.1%, chinese 20.9%"
    )
    assert sentence in call("check", "recipe.yaml")[1]
    status, out, _ = call("preview", "recipe.yaml", "--json")
    counts = json.loads(out)["counts"]
    assert status == 0 and counts["notes"][0].startswith(sentence)
    assert counts["train"]["rows"] + counts["evaluation"]["rows"] + sum(counts["left_out"].values()) == 40
    (note,) = counts["left_out"]
    assert "more.jsonl (weight: 0.2088 of the text; " in note
    assert json.loads(call("lint", "recipe.yaml", "--json")[1])["rows"] == 40
    status, out, err = call("train", "recipe.yaml", "--json")
    assert status == 0 and json.loads(out)["steps"] == 1 and sentence in err


def list_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_the_straight_line(call, folder):
    status, out, _ = call("check", "recipe.yaml", "--json")
    assert (status, json.loads(out)["ok"]) == (0, True)

    status, out, _ = call("preview", "recipe.yaml", "--json", "-n", 2)
    preview = json.loads(out)
    assert status == 0
    assert preview["counts"]["train"]["rows"] == 16
    assert preview["counts"]["evaluation"]["rows"] == 4
    for row in preview["rows"]:
        assert len(row["token_ids"]) == len(row["trained"])
        assert row["token_ids"][-1] == 106
        assert row["trained"][-1] == 1

    status, out, err = call("train", "recipe.yaml", "--json")
    assert status == 0
    losses, rewards = {"train_loss", "eval_loss"}, {"train_reward", "eval_reward"}
    assert {"run", "steps", "tokens", "seconds", "best_step", "warnings"} | losses | rewards == set(json.loads(out))
    assert "effective batch size: 2 rows (micro-batch size 2 x 1 accumulation steps x 1 process)" in err

    status, out, _ = call("export", "run", "-o", "exported", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["verify"]["max_abs"] <= 1e-4
    assert report["verify"]["top1_agreement"] == 1.0
    assert {"output", "bytes", "seconds", "verify"} <= set(report)
    generation = json.loads((folder / "exported" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 106], "pad_token_id": 102}
    assert json.loads((folder / "exported" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]

    scores = {}
    for model in ("run", "exported", "nano"):
        status, out, _ = call("evaluate", model, "--data", "rows.jsonl", "--json")
        assert status == 0
        scores[model] = json.loads(out)
        assert set(scores[model]) == {"loss", "perplexity", "accuracy", "tokens", "stderr", "worst"}
    assert scores["run"]["loss"] == pytest.approx(scores["exported"]["loss"], abs=1e-5)
    assert scores["run"]["loss"] != pytest.approx(scores["nano"]["loss"], abs=1e-5)

    for model in ("run", "exported"):
        status, out, _ = call("chat", model, "--prompt", "你好！", "--max-new-tokens", 3, "--json")
        assert status == 0
        assert set(json.loads(out)) == {"answer", "tokens", "stopped_by"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_lint_only_names_kinds_that_there_are(call, folder):
    write_rows(
        folder / "rows.jsonl", [{"prompt": "Why?", "completion": text} for text in ("It is so.", "It is so.", " ")]
    )
    before = list_files(folder)
    status, _, err = call("lint", "recipe.yaml", "--fix", "fixed", "--only", "unreadable,duplicates")
    assert status == 2
    assert "'duplicates' is an unknown kind; did you mean 'duplicate'?" in err
    status, _, err = call("lint", "recipe.yaml", "--only", "duplicate")
    assert (status, "--fix" in err, list_files(folder)) == (2, True, before)
    status, out, _ = call("lint", "recipe.yaml", "--fix", "fixed", "--only", "duplicate")
    assert (status, out.endswith("wrote 2 of 3 rows (left out: 1 duplicate): fixed\n")) == (0, True)


def test_preview_names_the_keys_that_are_not_used(call, folder):
    write_rows(
        folder / "rows.jsonl", [{"prompt": f"{n}?", "completion": "Yes.", "source": "x", "id": n} for n in range(1, 9)]
    )
    status, out, _ = call("preview", "recipe.yaml")
    assert (status, "\nkeys not used: id (8 rows), source (8 rows)\n" in out) == (0, True)


def test_lint_reports_and_fixes(call, folder):
    good = [{"prompt": f"What follows {number}?", "completion": f"It is {number + 1}."} for number in range(12)]
    bad = [good[0], {"prompt": "Why?", "completion": " "}, {"question": "Why?"}]
    write_rows(folder / "rows.jsonl", [*good, *bad, {"prompt": "One word?", "completion": "Yes"}])
    before = list_files(folder)
    status, out, err = call("lint", "recipe.yaml", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["counts"] == {"unreadable": 1, "empty_text": 1, "duplicate": 1, "one_word": 1}
    assert (report["rows"], report["passed"]) == (16, 13)
    assert report["left_out"] == {"duplicate": 1, "empty_text": 1, "unreadable": 1}
    assert {"kind", "severity", "count", "file", "line", "text", "examples"} <= set(report["findings"][0])
    assert [(found["kind"], found["line"]) for found in report["findings"]] == [
        ("unreadable", 15),
        ("empty_text", 14),
        ("duplicate", 13),
        ("one_word", 16),
    ]
    assert list_files(folder) == before

    status, out, _ = call("lint", "recipe.yaml", "--fix", "fixed")
    assert status == 0
    assert (
        f"error unreadable, 1 row: cannot be read (left out by --fix)\n  {folder / 'rows.jsonl'}:15  has no 'prompt'"
        in out
    )
    assert out.endswith("wrote 13 of 16 rows (left out: 1 duplicate, 1 empty_text, 1 unreadable): fixed\n")
    assert list_files(folder) == ["fixed/rows.jsonl", *before]
    status, out, _ = call("preview", "recipe.yaml", "-s", "data.train=fixed/rows.jsonl", "--json")
    assert (status, json.loads(out)["counts"]["train"]["rows_read"]) == (0, 13 - 4)
    status, out, _ = call("lint", "recipe.yaml", "-s", "data.train=fixed/rows.jsonl", "--json")
    assert json.loads(out)["counts"] == {"one_word": 1}

    status, _, err = call("lint", "recipe.yaml", "--fix", "fixed")
    assert status == 2
    assert "fixed: the output folder exists and is not empty" in err


def test_preview_as_a_page(call, folder):
    status, out, err = call("preview", "recipe.yaml", "-n", 2, "--html", "pages/rows.html", "--json")
    assert (status, err) == (0, "wrote pages/rows.html\n")
    page = (folder / "pages" / "rows.html").read_text(encoding="utf-8")
    for row in json.loads(out)["rows"]:
        assert all(f'title="{token}"' in page for token in row["token_ids"][:5])
    assert page.count("<article>") == 2
    assert call("preview", "recipe.yaml", "--html", "pages/rows.html")[0] == 0
    assert (folder / "pages" / "rows.html").read_text(encoding="utf-8").count("<article>") == 3
    status, out, err = call("preview", "recipe.yaml", "--html", "rows.jsonl")
    assert (status, out) == (2, "")
    assert "rows.jsonl: exists and was not written by `finetune preview`; choose another name, or remove it" in err
    assert list_files(folder) == ["pages/rows.html", "recipe.yaml", "rows.jsonl"]


def test_evaluate_is_the_mean_over_all_trained_tokens(call, folder, nano_llama):
    """A reference without chunks, sorting or batches: the loss of transformers, weighted by hand."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from finetune.data.encoding.rendering import encode_conversations
    from finetune.data.encoding.template import find_template

    tokenizer, model = AutoTokenizer.from_pretrained(nano_llama), LlamaForCausalLM.from_pretrained(nano_llama)
    rows = [json.loads(line)["messages"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    total, count = 0.0, 0
    for encoded in encode_conversations(tokenizer, find_template("yulan-mini", tokenizer), rows):
        labels = [t if is_trained else -100 for t, is_trained in zip(encoded.token_ids, encoded.trained, strict=True)]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([encoded.token_ids]), labels=torch.tensor([labels])).loss
        total, count = total + loss.item() * sum(encoded.trained), count + sum(encoded.trained)
    _, out, _ = call("evaluate", "nano", "--data", "rows.jsonl", "--json")
    scores = json.loads(out)
    assert scores["tokens"] == count
    assert scores["loss"] == pytest.approx(total / count, abs=1e-5)


def test_checkpoints(call):
    status, out, _ = call("checkpoints", "--json")
    table = {row["alias"]: row for row in json.loads(out)}
    assert status == 0
    assert table["base"]["gsm8k"] == 68.46
    assert table["phase25"]["optimizer_states"] is True
    status, out, _ = call("checkpoints")
    assert "yulan-team/YuLan-Mini-Before-Annealing" in out


def test_fold(call, folder, nano):
    status, out, _ = call("fold", nano, "-o", "folded", "--dtype", "bfloat16", "--max-shard-size", "2MB", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["dtype"] == "bfloat16"
    shards = sorted((folder / "folded").glob("*.safetensors"))
    assert len(shards) > 1
    assert report["bytes"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())


BAD_FILES = {
    "broken.jsonl": ROW * 17 + '{"messages": [\n' + ROW,
    "empty.jsonl": "",
    "user.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
    "fields.jsonl": '{"question": "a", "response": "b"}\n',
    "good.jsonl": ROW * 10,
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle.quantize=nf4"], "modle: unknown key; did you mean 'model'?"),
        (["adapter.rank=big"], "adapter.rank: must be a whole number; found 'big'"),
        (["data.train=row.jsonl"], "data.train: row.jsonl does not exist; rows.jsonl does"),
        (["data.train=broken.jsonl"], "broken.jsonl, line 18: broken JSON"),
        (["data.train=empty.jsonl"], "empty.jsonl: the file holds no rows"),
        (["data.train=user.jsonl"], "user.jsonl, line 1: the conversation ends with the user"),
        (["data.train=fields.jsonl"], "data.columns: {prompt: question, completion: response}"),
        (["data.template=plain.jinja"], "plain.jinja: does not mark what is trained"),
        (["data.max_tokens=9"], "20 of 20 rows are longer than data.max_tokens: 9"),
        (["model.checkpoint=nanno"], "model.checkpoint: 'nanno' is unknown; did you mean 'nano'?"),
        (["model.checkpoint=weightless"], "weightless: holds no weights"),
        (["model.attention=flash_attention_2"], "model.attention: flash_attention_2 cannot run here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_recipes_give_one_message_and_leave_nothing(call, folder, nano, overrides, message):
    for name, text in BAD_FILES.items():
        (folder / name).write_text(text)
    (folder / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    shutil.copytree(nano, folder / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    before = list_files(folder)
    extra = ["data.held_out=0"] if overrides == ["data.max_tokens=9"] else []
    status, out, err = call("train", "recipe.yaml", *(word for item in overrides + extra for word in ("-s", item)))
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert list_files(folder) == before


def test_a_key_written_twice_is_refused(call, folder):
    (folder / "recipe.yaml").write_text(RECIPE + "output: other\n")
    status, _, err = call("check", "recipe.yaml")
    assert status == 2
    assert "the key 'output' stands twice, in lines 6 and 7" in err


def test_check_lists_problems_as_json(call, folder):
    status, out, _ = call("check", "recipe.yaml", "-s", "methd=sft", "-s", "adapter.rank=0", "--json")
    assert status == 2
    assert json.loads(out) == {
        "ok": False,
        "problems": ["methd: unknown key; did you mean 'method'?", "adapter.rank: must be at least 1; found 0"],
        "recipe": None,
    }


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def misshape(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, path)


def pickle_only(path):
    path.rename(path.with_name("pytorch_model.bin"))


def point_outside(path):
    names = load_file(path).keys()
    index = {"weight_map": dict.fromkeys(names, "../../secret.safetensors")}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def lose_shard(path):
    names = load_file(path).keys()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "holds no weights"),
        (cut, "it is truncated or damaged, download it again"),
        (misshape, "1 of a wrong shape (model.norm.weight is [3], expected [320])"),
        (pickle_only, "holds only pickled weights (pytorch_model.bin)"),
        (point_outside, "names the file '../../secret.safetensors', which lies outside the folder"),
        (lose_shard, "the shard model-00001-of-00002.safetensors that model.safetensors.index.json names is missing"),
    ],
    ids=["no-weights", "truncated", "wrong-shape", "pickled", "outside", "shard-missing"],
)
def test_bad_checkpoints_give_one_message_and_leave_nothing(call, folder, nano, damage, message):
    shutil.copytree(nano, folder / "copy")
    damage(folder / "copy" / "model.safetensors")
    for verb in (["fold", "copy", "-o", "folded"], ["train", "recipe.yaml", "-s", "model.checkpoint=copy"]):
        status, out, err = call(*verb)
        assert (status, out) == (2, "")
        assert message in err
    assert not (folder / "folded").exists()
    assert not (folder / "run").exists()


def test_a_full_folder_is_not_written_to(call, folder, nano):
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    for verb in (["fold", nano, "-o", "full"], ["train", "recipe.yaml", "-s", "output=full"], ["demo", "-o", "full"]):
        status, _, err = call(*verb)
        assert status == 2
        assert "the output folder exists and is not empty" in err
    assert list_files(folder / "full") == ["mine.txt"]


def test_an_adapter_for_another_base_is_refused(call, folder, nano):
    shutil.copytree(nano, folder / "copy")
    assert call("fold", "copy", "-o", "llama")[0] == 0
    assert call("train", "recipe.yaml", "-s", "model.checkpoint=llama")[0] == 0
    tensors = load_file(folder / "llama" / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, folder / "llama" / "model.safetensors", metadata={"format": "pt"})
    status, _, err = call("export", "run", "-o", "exported")
    assert status == 2
    assert "was trained on other weights than" in err
    assert not (folder / "exported").exists()


def test_an_unfinished_run_is_not_exported(call, folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    status, _, err = call("export", "run", "-o", "exported")
    assert status == 2
    assert "this run has not finished" in err


def test_a_mixture_is_previewed(call, folder):
    recipe = "data: {train: [{path: rows.jsonl, rows: 12}, {path: more.jsonl, weight: 1}], held_out: 2}\n"
    (folder / "more.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    (folder / "mixture.yaml").write_text((folder / "recipe.yaml").read_text().replace("data:", "#") + recipe)
    status, out, _ = call("preview", "mixture.yaml", "--json")
    report = json.loads(out)["counts"]
    assert status == 0
    assert (report["train"]["rows"], report["evaluation"]["rows"]) == (30, 2)
    assert list(report["left_out"].values()) == [8]
    _, out, _ = call("preview", "mixture.yaml")
    assert "8 rows are left out: not drawn from " in out
    assert "rows.jsonl (rows: 12; 12 of 20 are taken)" in out


def test_a_full_disk_is_one_sentence(call, folder, nano, monkeypatch):
    import errno

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune.yulan.folding.FoldedTensors.make_rows", fail)  # in one of the threads
    status, _, err = call("fold", nano, "-o", "folded")
    assert status == 2
    assert "folded: cannot be written: the disk is full" in err
    assert list_files(folder) == ["recipe.yaml", "rows.jsonl"]


def test_nf4_where_bitsandbytes_cannot_run(call, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # importing it then fails
    status, _, err = call("train", "recipe.yaml", "-s", "model.quantize=nf4")
    assert status == 2
    assert "model.quantize: nf4 cannot run on this cpu device" in err
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preview", "demo", "-n", "-1"], "must be a whole number above 0; found '-1'"),
        (["chat", "nano", "--max-new-tokens", "0"], "must be a whole number above 0; found '0'"),
        (["fold", "nano", "-o", "x", "--max-shard-size", "huge"], "--max-shard-size: 'huge' is not a size"),
        (["fold", "nano", "-o", "recipe.yaml/x"], "recipe.yaml/x: cannot be made: File exists"),
        (["export", "nowhere", "-o", "x"], "nowhere: there is no such folder"),
        (["export", ".", "-o", "x"], ".: is neither a run directory nor an adapter folder"),
        (["evaluate", "nosuch", "--data", "rows.jsonl"], "'nosuch' is unknown"),
        (["chat", ".", "--prompt", "hi"], "holds no config.json, so it is not a checkpoint"),
        (["train", "recipe.yam"], "there is no such file; . holds recipe.yaml"),
        (["train", "."], "is a folder; name a recipe, such as recipe.yaml"),
        (["tran", "recipe.yaml"], "invalid choice: 'tran'"),
    ],
)
def test_wrong_arguments_are_one_message(call, folder, arguments, message):
    before = list_files(folder)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert list_files(folder) == before


def test_an_interrupt_exits_with_130(call, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.checkpoints.checkpoint_table.describe_checkpoints", interrupt)
    status, _, err = call("checkpoints")
    assert (status, err) == (130, "finetune checkpoints: interrupted\n")


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("finetune.checkpoints.checkpoint_table.describe_checkpoints", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["checkpoints"])


def test_the_module_runs_too():
    done = subprocess.run([sys.executable, "-m", "finetune", "--help"], capture_output=True, text=True, check=True)
    assert "finetune demo" in done.stdout


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys, finetune\nfrom finetune.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
