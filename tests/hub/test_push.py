"""Uploads: what is sent, to whom it is readable, what is refused, and what a second try sends."""

import json
import shutil

import pytest
from stand_in import Fault, Repository

from finetune.cli.main import main
from finetune.errors import ExportError, HubError, RecipeError
from finetune.pipeline.push import push_result
from finetune.runs.results import open_result

# The library itself calls its HTTP client so.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
SECRET = "hf_thisIsTheToken"


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, nano):
    """A run with an adapter of a few steps on nano."""
    from finetune.check.recipes import load_recipe
    from finetune.files.resources import find_demo_data
    from finetune.training.run import run_training

    folder = tmp_path_factory.mktemp("run")
    settings = (
        f"output={folder / 'run'}",
        f"data.train={find_demo_data('demo_eval.jsonl')}",
        "data.eval=[]",
        "trainer.max_steps=2",
        "answers=0",
        "trainer.disable_tqdm=true",
    )
    run_training(load_recipe("demo", settings))
    return folder / "run"


def read(hub, name):
    repository = hub.repositories["models", name]
    return repository.commits[repository.refs["main"]]


def call(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    return ended.value.code, shown.out, shown.err


def test_a_runs_adapter_is_sent_with_its_card_and_nothing_else(hub, logged_in, adapter_run, capsys):
    code, out, err = call(capsys, "push", adapter_run, "me/mine", "--json")
    assert code == 0, err
    assert json.loads(out)["private"] is True
    assert hub.created[0]["visibility"] == "private"
    files = read(hub, "me/mine")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(files)
    # Neither rows of the training nor paths of this machine.
    assert not {"rows.json", "texts.json", "finetune.json", "run.json", "recipe.yaml", "manifest.json"} & set(files)
    assert not [name for name, content in files.items() if str(adapter_run.parent).encode() in content]
    assert b"/tmp" not in files["adapter_config.json"]
    assert {one.token for one in hub.log if "/put/" not in one.path and "/cdn/" not in one.path} == {SECRET}


def test_an_export_is_sent_when_that_is_asked_for(hub, logged_in, adapter_run, tmp_path, capsys):
    output = tmp_path / "export"
    code, out, err = call(capsys, "export", adapter_run, "-o", output, "--no-verify")
    assert code == 0, err
    assert hub.log == []  # nothing is sent unless asked
    code, out, err = call(capsys, "push", output, "me/model", "--public")
    assert code == 0, err
    assert "everybody can read it" in out
    files = read(hub, "me/model")
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert files["README.md"].startswith(b"---\nlicense: mit\n")
    assert "export.json" not in files
    code, out, err = call(
        capsys, "export", adapter_run, "-o", tmp_path / "a", "--adapter", "--push", "me/adapter", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["push"]["private"] is True
    assert "adapter_model.safetensors" in read(hub, "me/adapter")


def test_a_broken_upload_goes_on_where_it_stopped(hub, logged_in, adapter_run, no_waiting):
    hub.faults = [Fault("/commit/", "status", 500)]
    with pytest.raises(HubError, match=r"a fault of its own \(status 500\)"):
        push_result(adapter_run, "me/mine")
    sent = [one for one in hub.log if one.method == "PUT"]
    assert len(sent) == len(hub.uploaded) == 1
    assert no_waiting
    hub.faults = []
    hub.log.clear()
    push_result(adapter_run, "me/mine")
    assert [one for one in hub.log if one.method == "PUT"] == []
    assert "adapter_model.safetensors" in read(hub, "me/mine")


def test_a_fault_that_passes_is_not_seen(hub, logged_in, adapter_run, no_waiting):
    hub.faults = [Fault("/put/", "status", 503, times=1), Fault("/preupload/", "status", 500, times=1)]
    push_result(adapter_run, "me/mine")
    assert "adapter_model.safetensors" in read(hub, "me/mine")


def test_what_is_refused_before_anything_is_sent(hub, logged_in, adapter_run, tmp_path, monkeypatch):
    public = Repository()
    public.commit({"README.md": b""})
    hub.repositories["models", "me/public"] = public
    with pytest.raises(HubError, match="exists, and everybody can read it, so nothing was sent; add --public"):
        push_result(adapter_run, "me/public")
    other = Repository(private=True, tokens=(SECRET,))
    other.commit({"model.safetensors": b"x"})
    hub.repositories["models", "me/other"] = other
    with pytest.raises(HubError, match=r"holds other weights \(model.safetensors\)"):
        push_result(adapter_run, "me/other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="holds no weights with a model card"):
        push_result(tmp_path / "empty", "me/empty")
    with pytest.raises(HubError, match="names no owner; write OWNER/NAME"):
        push_result(adapter_run, "mine")
    with pytest.raises(HubError, match="cannot be the name of a repository"):
        push_result(adapter_run, "me/mine/more")
    assert not [one for one in hub.log if one.method in ("PUT", "POST") and "create" not in one.path]
    monkeypatch.delenv("HF_TOKEN")
    hub.log.clear()
    with pytest.raises(HubError, match="log in with `hf auth login`, with a token that may write"):
        push_result(adapter_run, "me/mine")
    assert hub.log == []


def test_a_token_that_may_only_read(hub, logged_in, adapter_run):
    hub.faults = [Fault("/api/repos/create", "status", 403, message="Forbidden")]
    with pytest.raises(HubError, match="your token may not do this with me/mine; make one that may at http"):
        push_result(adapter_run, "me/mine")


def test_all_weights_are_exported_first(hub, logged_in, train):
    run = train("full", "adapter={kind: none}", "trainer.max_steps=1")
    with pytest.raises(ExportError, match=r"finetune export .* -o FOLDER --push me/mine"):
        push_result(run, "me/mine")


def test_an_upload_of_trl_is_refused(make_recipe):
    """Issue 19, A3: it put an older checkpoint's adapter into the run's root, and export took that one."""
    with pytest.raises(RecipeError, match=r"trainer.push_to_hub: .*upload with `finetune push`"):
        make_recipe("run", "trainer.push_to_hub=true")


def test_a_run_is_what_lies_in_its_adapter_folder(adapter_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapter_run, run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / "adapter" / name, run / name)
    assert open_result(run).folder == run / "adapter"
