"""A corpus of damaged and hostile files: bases, adapters, runs, checkpoints, judges, states, templates, rows and recipes.

Each case must end in one message (or be read as what it is), run nothing, show nothing of a file outside, and take neither time nor
memory: at most 10 seconds and 2 GB.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from injector import Outcome, Server
from kinds import Kind
from tries import Tally

MOST_SECONDS, MOST_BYTES = 10, 2 << 30
SECRET = "SECRET-7f3a91"
_TRAINER = (
    "{max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: 'no', eval_strategy: 'no', "
    "gradient_checkpointing: false, disable_tqdm: true}"
)
_ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@dataclass(frozen=True)
class Sources:
    """What the cases are made of, whole: a native and a folded base, a finished run, a reward run and a run with states."""

    native: Path
    llama: Path
    run: Kind
    judge: Path
    pretrain: Kind


@dataclass(frozen=True)
class Case:
    """One hostile case: `make` writes it into an empty folder and returns the command lines that meet it.

    Where `may_work`, what was damaged is optional, or is made anew, so the work may end well.
    """

    kind: str
    name: str
    make: Callable[[Path], list[list[str]]]
    may_work: bool = False


def run_case(server: Server, case: Case, folder: Path) -> list[str]:
    """Run the command lines of a case in a new folder and return what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "case"
    work.mkdir(parents=True)
    (folder / "secret").write_text(f'{{"{SECRET}": "{SECRET}"}}')
    faults = []
    for line in case.make(work):
        outcome = server.run(line, folder)
        faults += [f"{case.kind}, {case.name}, {line[0]}: {fault}" for fault in _list_faults(case, outcome)]
    if (folder / "pwned").exists():
        faults.append(f"{case.kind}, {case.name}: code was run")
    shutil.rmtree(folder)
    return faults


def _list_faults(case: Case, outcome: Outcome) -> Iterator[str]:
    if outcome.has_traceback:
        yield f"a traceback\n{outcome.text[-1500:]}"
    elif outcome.status not in ((0, 2) if case.may_work else (2,)):
        yield f"status {outcome.status}\n{outcome.text[-500:]}"
    if SECRET in outcome.text:
        yield "shows a file outside"
    if outcome.seconds > MOST_SECONDS:
        yield f"took {outcome.seconds} seconds"
    if outcome.peak_bytes > MOST_BYTES:
        yield f"took {outcome.peak_bytes / 1e9:.1f} GB"


def meet_everything(server: Server, sources: Sources, work: Path) -> Iterator[Tally]:
    """Run every case and yield the counts of each kind."""
    tallies: dict[str, Tally] = {}
    for case in list_cases(sources):
        tally = tallies.setdefault(case.kind, Tally(f"hostile {case.kind}", "content"))
        tally.tries += 1
        for fault in run_case(server, case, work / "hostile"):
            name = "traceback" if "a traceback" in fault else "status" if "status" in fault else "another result"
            tally.note(name, tally.tries, fault)
    yield from tallies.values()


def list_cases(sources: Sources) -> list[Case]:
    """Return all cases."""
    makers = (_bases, _headers, _configs, _adapters, _runs, _checkpoints, _judges, _states, _templates, _rows, _recipes)
    return [case for make in makers for case in make(sources)]


# --- How one file is damaged --------------------------------------------------------------------------------------------


def _write(content: bytes) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink(missing_ok=True)  # it may be a second name of the whole file
        file.write_bytes(content)

    return change


def _cut(file: Path) -> None:
    content = file.read_bytes()
    _write(content[: len(content) // 2])(file)


def _pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def _link(target: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    return change


def _link_to_secret(file: Path) -> None:
    outside = next(parent for parent in file.parents if parent.name == "hostile")
    _link(str(outside / "secret"))(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": _write(b""),
    "cut": _cut,
    "null": _write(b"null"),
    "a list": _write(b"[1]"),
    "deep": _write(b"[" * 200_000),
    "not UTF-8": _write(b"\xff\xfe{}"),
    "a pipe": _pipe,
    "a device": _link("/dev/zero"),
    "a link outside": _link_to_secret,
    "a folder": _folder,
}


def _pickle(file: Path) -> bytes:
    outside = next(parent for parent in file.parents if parent.name == "hostile")
    return b"cposix\nsystem\n(S'touch " + str(outside / "pwned").encode() + b"'\ntR."


def _copy(source: Path, folder: Path) -> Path:
    """Copy a folder by second names of its files, which cost nothing; whoever changes a file removes its name first."""
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def _write_recipe(folder: Path, text: str, rows: str = _ROW * 4) -> Path:
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"data: {{train: {folder / 'rows.jsonl'}, max_tokens: 64}}\nanswers: 0\noutput: {folder / 'run'}\n"
        f"adapter: {{rank: 2, alpha: 4}}\ntrainer: {_TRAINER}\n{text}\n",
        encoding="utf-8",
    )
    return recipe


def _change_json(file: Path, **values: Any) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    _write(json.dumps(content).encode())(file)


# --- Bases --------------------------------------------------------------------------------------------------------------


def _train_base(source: Path, change: Callable[[Path], object], extra: str = "") -> Callable[[Path], list[list[str]]]:
    def make(folder: Path) -> list[list[str]]:
        base = _copy(source, folder / "base")
        change(base)
        return [["train", str(_write_recipe(folder, f"model: {{checkpoint: {base}{extra}}}"))]]

    return make


def _bases(sources: Sources) -> Iterator[Case]:
    # The tokenizer is read from tokenizer.json; what the others say of it is looked at where it is there and whole.
    optional = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
    for kind, source in (("native base", sources.native), ("Llama base", sources.llama)):
        for file in sorted(source.glob("*")):
            if file.name == "manifest.json" or not file.is_file():
                continue
            for name, damage in DAMAGES.items():
                change = lambda base, damage=damage, file=file: damage(base / file.name)  # noqa: E731
                yield Case(kind, f"{file.name}: {name}", _train_base(source, change), file.name in optional)
    for shard in ("../secret", "/etc/passwd", "a/../../secret", "..", "", "C:\\x.safetensors", "weights.bin"):
        yield Case("Llama base", f"index to {shard!r}", _train_base(sources.llama, _name_shard(shard)))


def _name_shard(shard: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        (base / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _pack(header: bytes, content: bytes = bytes(4)) -> bytes:
    return struct.pack("<Q", len(header)) + header + content


_HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HEADERS = {
    "zeros": bytes(8),
    "endless": b"\xff" * 7 + b"\x7f" + _HEADER,
    "no JSON": _pack(b"{{{{"),
    "a list": _pack(b"[]"),
    "deep": _pack(b"[" * 200_000),
    "unknown type": _pack(_HEADER.replace(b"F32", b"F8_")),
    "negative": _pack(_HEADER.replace(b"[1]", b"[-1]")),
    "too long": _pack(_HEADER.replace(b"[0,4]", b"[0,9]")),
    "huge shape": _pack(_HEADER.replace(b"[1]", b"[99999999999999999999]")),
    "overlapping": _pack(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
    ),
    "text offsets": _pack(_HEADER.replace(b"[0,4]", b'["0","4"]')),
    "no tensors": _pack(b"{}", b""),
}


def _headers(sources: Sources) -> Iterator[Case]:
    for name, content in HEADERS.items():
        for kind, source in (("native base", sources.native), ("Llama base", sources.llama)):
            change = lambda base, content=content: [_write(content)(file) for file in base.glob("*.safetensors")]  # noqa: E731
            yield Case(kind, f"header: {name}", _train_base(source, change))


CONFIGS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 2.5},
    {"hidden_size": "1e9"},
    {"vocab_size": 10**30},
    {"num_attention_heads": 0},
    {"num_key_value_heads": None},
    {"rms_norm_eps": "small"},
    {"hidden_act": {}},
    {"rope_scaling": "yarn"},
    {"architectures": "Llama"},
    {"model_type": 5},
    {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"},
    {"quantization_config": {"quant_method": "evil"}},
    {"max_position_embeddings": 10**12},
)


def _configs(sources: Sources) -> Iterator[Case]:
    for values in CONFIGS:
        for kind, source in (("native base", sources.native), ("Llama base", sources.llama)):
            change = lambda base, values=values: _change_json(base / "config.json", **values)  # noqa: E731
            # The native configuration is replaced by the fold where a key means nothing to it.
            yield Case(kind, f"config {json.dumps(values)[:60]}", _train_base(source, change), may_work=True)


# --- Adapters, runs, checkpoints, judges, states ------------------------------------------------------------------------

ADAPTERS: tuple[dict[str, Any], ...] = (
    {"target_modules": r"(([a-z_.0-9]+)+)+!"},
    {"target_modules": "(" * 5000},
    {"target_modules": {"a": 1}},
    {"exclude_modules": r"(.*a?)*(.*b?)*(.*c?)*!"},
    {"rank_pattern": {r"((\w|\.)+)+!": 4}},
    {"modules_to_save": ["(((("]},
    {"modules_to_save": 5},
    {"layers_pattern": [7]},
    {"peft_type": "EVIL"},
    {"r": 10**12},
    {"r": -1},
    {"lora_alpha": "NaN"},
    {"base_model_name_or_path": "../../../etc/passwd"},
    {"auto_mapping": {"base_model_class": "evil", "parent_library": "os"}},
    {"lora_bias": {}, "bias": 9},
    {"trainable_token_indices": {"embed_tokens": [10**9]}},
)


def _use_run(
    sources: Sources, change: Callable[[Path], object], lines: tuple[str, ...]
) -> Callable[[Path], list[list[str]]]:
    def make(folder: Path) -> list[list[str]]:
        run = _copy(sources.run.output, folder / "run")
        change(run)
        commands = {
            "export": ["export", str(run), "-o", str(folder / "export"), "--no-verify"],
            "chat": ["chat", str(run), "--prompt", "a", "--max-new-tokens", "1"],
            "train": [*sources.run.start, "-s", f"output={run}", "--resume"],
            "next": [
                "train",
                str(_write_recipe(folder, f"model: {{checkpoint: {run}}}")),
                "-s",
                f"output={folder / 'second'}",
            ],
        }
        return [commands[line] for line in lines]

    return make


def _adapters(sources: Sources) -> Iterator[Case]:
    verbs = ("export", "chat", "next")
    for seals in (True, False):
        for file in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
            for name, damage in DAMAGES.items():

                def change(run: Path, damage=damage, file=file, seals=seals) -> None:
                    damage(run / "adapter" / file)
                    if not seals and file != "manifest.json":
                        (run / "adapter" / "manifest.json").unlink()

                if seals or file != "manifest.json":
                    name = f"{file}: {name}{'' if seals else ', no manifest'}"
                    yield Case("adapter", name, _use_run(sources, change, verbs if not seals else verbs[:1]))
    for values in ADAPTERS:

        def change(run: Path, values=values) -> None:
            _change_json(run / "adapter" / "adapter_config.json", **values)
            (run / "adapter" / "manifest.json").unlink()

        yield Case("adapter", f"config {json.dumps(values)[:60]}", _use_run(sources, change, verbs), may_work=True)


def _runs(sources: Sources) -> Iterator[Case]:
    for file in ("run.json", "recipe.yaml", "metrics.jsonl", "answers.md", "adapter"):
        for name, damage in DAMAGES.items():

            def change(run: Path, damage=damage, file=file) -> None:
                if (run / file).is_dir():
                    shutil.rmtree(run / file)
                (run / file).touch()  # a run without answers has no page of them
                damage(run / file)

            # The metrics and answers are for people: nothing reads them back.
            case = _use_run(sources, change, ("export", "chat", "next", "train"))
            yield Case("run", f"{file}: {name}", case, may_work=True)


def _begin_again(run: Path) -> None:
    """Make a finished run one that was killed after its last checkpoint."""
    shutil.rmtree(run / "adapter")
    _change_json(run / "run.json", status="running")


def _checkpoints(sources: Sources) -> Iterator[Case]:
    for name in (
        "checkpoint-²",
        "checkpoint-9" + "9" * 40,
        "checkpoint--1",
        "checkpoint-",
        "checkpoint-3\x1b[2J",
        "checkpoint-٣",
    ):

        def change(run: Path, name=name) -> None:
            _begin_again(run)
            _copy(run / "checkpoint-2", run / name)

        yield Case("checkpoint", f"named {name[:20]!r}", _use_run(sources, change, ("train",)), may_work=True)
    for file in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        "counts.json",
    ):
        for name, damage in {**DAMAGES, "a pickle": lambda path: _write(_pickle(path))(path)}.items():

            def change(run: Path, damage=damage, file=file) -> None:
                _begin_again(run)
                for checkpoint in run.glob("checkpoint-*"):
                    damage(checkpoint / file)
                    _seal(checkpoint)

            yield Case("checkpoint", f"{file}: {name}", _use_run(sources, change, ("train",)), may_work=True)


def _seal(checkpoint: Path) -> None:
    """Write the manifest anew, so that it says that the damaged files are whole; pipes and devices have no hash."""
    from finetune.files.safety.manifests import write_manifest

    manifest = checkpoint / "manifest.json"
    manifest.unlink()
    write_manifest(checkpoint, [path for path in checkpoint.rglob("*") if path.is_file()])


def _judges(sources: Sources) -> Iterator[Case]:
    def use(change: Callable[[Path], object]) -> Callable[[Path], list[list[str]]]:
        def make(folder: Path) -> list[list[str]]:
            judge = _copy(sources.judge, folder / "judge")
            change(judge)
            text = f"method: grpo\nmodel: {{checkpoint: nano}}\nrewards: {{rules: {{language: 0.5}}, judge: {{run: {judge}}}}}\n"
            recipe = _write_recipe(folder, text)
            options = ["trainer.num_generations=2", "trainer.max_completion_length=2", "data.max_tokens=64"]
            return [["train", str(recipe), *(word for option in options for word in ("-s", option))]]

        return make

    for file in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "run.json", "recipe.yaml"):
        for name, damage in DAMAGES.items():

            def change(judge: Path, damage=damage, file=file) -> None:
                damage(judge / file)
                (judge / "adapter" / "manifest.json").unlink()

            yield Case("judge", f"{file}: {name}", use(change), may_work=not file.startswith("adapter"))


def _states(sources: Sources) -> Iterator[Case]:
    def use(change: Callable[[Path], object]) -> Callable[[Path], list[list[str]]]:
        def make(folder: Path) -> list[list[str]]:
            model = _copy(sources.pretrain.output / "model", folder / "model")
            (model / "manifest.json").unlink()
            change(model)
            options = [f"model.checkpoint={model}", f"optimizer.states={model}", f"output={folder / 'run'}"]
            return [[*sources.pretrain.start, *(word for option in options for word in ("-s", option))]]

        return make

    def first(model: Path, pattern: str) -> Path:
        return sorted(model.glob(f"global_step*/{pattern}"))[0]

    for pattern in ("zero/*/exp_avg.pt", "zero/*/fp32.pt"):
        damages = {**DAMAGES, "a pickle": lambda path: _write(_pickle(path))(path)}
        for name, damage in damages.items():
            change = lambda model, damage=damage, pattern=pattern: damage(first(model, pattern))  # noqa: E731
            yield Case("states", f"{pattern}: {name}", use(change))
    for text in ("../../secret", "/etc", "", ".", "global_step9", "a\0b", "x" * 5000):
        change = lambda model, text=text: _write(text.encode())(model / "latest_universal")  # noqa: E731
        yield Case("states", f"pointer {text[:20]!r}", use(change))


# --- Templates, rows, recipes -------------------------------------------------------------------------------------------

TEMPLATES = (
    "{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "{{ messages[99].content }}",
    "{% include '/etc/passwd' %}",
    "{% import 'secret' as s %}{{ s }}",
    "{{ messages | nothing }}",
    "{% for message in messages %}",
    "{{ 'a' * 99999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ('a' * 1000) | center(9999999999) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ raise_exception('no') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ messages.append(1) }}{{ messages.clear() }}",
    "\x1b]0;title\x07{{ nothing.here }}",
    "{% set x = [] %}{% for i in range(30) %}{% set _ = x.append(x) %}{% endfor %}{{ x | tojson }}",
    "{% call(x) f() %}{% endcall %}",
)


def _templates(sources: Sources) -> Iterator[Case]:
    def use(source: bytes | None, damage: Callable[[Path], None] | None = None) -> Callable[[Path], list[list[str]]]:
        def make(folder: Path) -> list[list[str]]:
            file = folder / "own.jinja"
            file.write_bytes((source or b"x").replace(b"PWNED", str(folder.parent / "pwned").encode()))
            if damage is not None:
                damage(file)
            recipe = _write_recipe(folder, "model: {checkpoint: nano}")
            return [["preview", str(recipe), "-s", f"data.template={file}"]]

        return make

    for source in TEMPLATES:
        text = "{{ bos_token }}{% generation %}" + source + "{% endgeneration %}"
        yield Case("template", source[:40], use(text.encode()))
    for name, damage in DAMAGES.items():
        yield Case("template", name, use(None, damage))


ROWS = (
    b"",
    b"\n\n\n",
    b"{",
    b"null\n",
    b"[]\n",
    b"[[[[" * 50_000,
    b'{"a": ' * 50_000,
    b'{"messages": null}\n',
    b'{"messages": [1]}\n',
    b'{"messages": [{"role": "evil", "content": "x"}]}\n',
    b'{"messages": [{"role": "user", "content": 5}]}\n',
    b'{"messages": [{"role": "user"}]}\n',
    b'{"messages": {"role": "user", "content": "x"}}\n',
    b'{"messages": [{"role": "assistant", "content": "' + b"x" * 40_000_000 + b'"}]}\n',
    b'{"text": ' + b"9" * 100_000 + b"}\n",
    b'{"text": NaN}\n',
    b'{"text": "\\ud800"}\n',
    b"\xff\xfe\x00\n",
    b"\x00" * 1000,
    b"PK\x03\x04" + bytes(100),
    b"\x1f\x8b\x08" + bytes(100),
    b'{"prompt": "a"}\n{"chosen": "b"}\n',
    b'{"messages": [{"role": "user", "content": "\x1b[2J"}]}\n',
    b'{"__class__": "evil"}\n',
    b'{"text": "a"}\r{"text": "b"}\n{"text"\n',
)


def _rows(sources: Sources) -> Iterator[Case]:
    def use(
        content: bytes, name: str = "rows.jsonl", damage: Callable[[Path], None] | None = None
    ) -> Callable[[Path], list[list[str]]]:
        def make(folder: Path) -> list[list[str]]:
            recipe = _write_recipe(folder, "model: {checkpoint: nano}")
            (folder / name).write_bytes(content)
            if damage is not None:
                damage(folder / name)
            return [[verb, str(recipe), "-s", f"data.train={folder / name}"] for verb in ("preview", "train")]

        return make

    for content in ROWS:
        yield Case("rows", repr(content[:40]), use(content))
    for ending in ("parquet", "arrow", "csv", "json", "jsonl.gz", "jsonl.zst", "txt.gz", "tsv"):
        yield Case(
            "rows",
            f"{ending} of nonsense",
            use(b"\x00\x01nonsense" * 50, f"rows.{ending}"),
            may_work=ending in ("csv", "tsv"),
        )
        yield Case("rows", f"empty {ending}", use(b"", f"rows.{ending}"))
    for name, damage in DAMAGES.items():
        yield Case("rows", name, use(_ROW.encode() * 4, damage=damage), may_work=name == "cut")


RECIPES = (
    "a: &a [*a]",
    "[" * 50_000,
    "{a: " * 50_000,
    "a: !!python/object/apply:os.system ['touch PWNED']",
    "!!python/name:os.system",
    "a: !!python/object/new:type {args: [z, [], {}]}",
    "x" * 1_000_001,
    "data: {train: /etc/passwd}",
    "data: {train: /dev/zero, max_tokens: 64}",
    "data: {train: [[[[]]]]}",
    "data: {train: rows.jsonl, max_tokens: 99999999999999999999}",
    "data: {train: rows.jsonl, max_tokens: -1}",
    "data: {train: rows.jsonl, max_tokens: .nan}",
    "data: {train: rows.jsonl}\ndata: {train: rows.jsonl}",
    "data: {train: 'a\\0b'}",
    'data: {train: "a\\0b"}',
    f"data: {{train: {'x' * 5000}}}",
    "data: {train: rows.jsonl}\noutput: /dev/null/run",
    "data: {train: rows.jsonl}\nmodel: {checkpoint: ../../etc}",
    "data: {train: rows.jsonl}\nmodel: {checkpoint: 'file:///etc/passwd'}",
    "data: {train: rows.jsonl}\nadapter: {rank: 999999999999}",
    "data: {train: rows.jsonl}\ntrainer: {max_steps: 1e400}",
    "data: {train: rows.jsonl}\ntrainer: {output_dir: /etc}",
    "data: {train: rows.jsonl}\ntrainer: {deepspeed: /etc/passwd}",
    "data: {train: rows.jsonl}\ntrainer: {push_to_hub: true}",
    "data: {train: rows.jsonl}\ntrainer: {report_to: evil}",
    "data: {train: rows.jsonl}\nstages: [{name: ../../evil}]",
    "data: {train: rows.jsonl}\nmethod: __import__('os')",
    "? {a: b}\n: c",
    "<<: {a: b}",
    "%YAML 9.9\n---\na: b",
    "--- a\n--- b",
    "\ufeff\x07",
    "data: {train: rows.jsonl}\n\x1b[2J: 1",
    "- - - - - -",
    "data: 2026-99-99",
    "data: !!binary 'not base64 ###'",
    "data: !!timestamp 'never'",
    "1: 2",
    "null",
)


def _recipes(sources: Sources) -> Iterator[Case]:
    def use(content: bytes, damage: Callable[[Path], None] | None = None) -> Callable[[Path], list[list[str]]]:
        def make(folder: Path) -> list[list[str]]:
            (folder / "rows.jsonl").write_text(_ROW)
            file = folder / "recipe.yaml"
            file.write_bytes(content.replace(b"PWNED", str(folder.parent / "pwned").encode()))
            if damage is not None:
                damage(file)
            return [["check", str(file)]]

        return make

    for text in RECIPES:
        yield Case("recipe", repr(text[:60]), use(text.encode()))
    for name, damage in DAMAGES.items():
        yield Case("recipe", name, use(b"data: {train: rows.jsonl}\n", damage))
