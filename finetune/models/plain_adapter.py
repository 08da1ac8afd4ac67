"""Write an adapter as plain LoRA, the form that programs apply by themselves: one rank, one scale, matrices of projections only.

Anything else that an adapter can hold is named as the reason why it cannot be written so: trained token rows, DoRA, whole modules,
biases. Such a run still has its merged export.

Source of what other programs take: vLLM 0.32 (`vllm/lora/peft_helper.py`, `vllm/config/lora.py`), llama.cpp b11434
(`convert_lora_to_gguf.py`); docs/runtimes.md says what was tried.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError, describe_count
from finetune.files.folders import check_output_free, write_folder
from finetune.files.json_files import read_json, write_json
from finetune.files.sizes import describe_size
from finetune.runs.results import Result, open_result
from finetune.runs.run_files import LINEAGE_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE
from finetune.yulan.tensors import read_header
from finetune.yulan.tokenizer_files import TEMPLATE_FILE, copy_tokenizer

# vLLM refuses a larger rank unless --max-lora-rank allows it, and knows these limits only.
_SERVED_RANK = 16
_RANK_LIMITS = (16, 32, 64, 128, 256, 320, 512)
_ROUNDING = 1e-2  # of bfloat16 matrices whose scale was multiplied in; those of the kit are float32
_PROJECTION = re.compile(r"base_model\.model\.(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.lora_([AB])\.weight")
_UNUSABLE = (
    ("token_adapter", "it trains rows of the token tables (adapter.train_tokens)"),
    ("magnitude", "it is DoRA (adapter.dora), which scales whole rows"),
    ("lora_embedding", "it changes the token tables"),
    (".bias", "it trains biases"),
)
# These initializations change the base before training; an adapter of the kit with `init: pissa` is stored as plain LoRA.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that this form can express, or that say nothing about what an adapter computes.
# The other settings whose default is neither false nor empty. Asking PEFT would import it, which takes an export 3 seconds.
_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_EXPRESSIBLE = frozenset(
    [
        "peft_type",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
        "init_lora_weights",
        "peft_version",
        "auto_mapping",
    ]
)


Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AdapterReport:
    """A plain adapter that was written; `max_difference` is that of the update of any weight, read back, from the run's own."""

    output: Path
    rank: int
    alpha: float
    modules: int
    bytes: int
    max_difference: float


def list_obstacles(folder: Path) -> list[str]:
    """Return the reasons why an adapter cannot be written as plain LoRA; there are none where it can be."""
    config = read_json(folder / PEFT_CONFIG_FILE) or {}
    names = [name for name in read_header(folder / PEFT_WEIGHTS_FILE) if not _PROJECTION.fullmatch(name)]
    found = [reason for mark, reason in _UNUSABLE if any(mark in name for name in names)]
    names = [name for name in names if not any(mark in name for mark, _ in _UNUSABLE)]
    saved = config.get("modules_to_save") or ()
    whole = tuple([saved] if isinstance(saved, str) else saved)
    if rest := [name for name in names if not name.removesuffix(".weight").endswith(whole)]:
        found.append(f"it holds {rest[0]}, which is no LoRA matrix of a projection")
    if len(rest) < len(names):
        found.append(f"it trains {' and '.join(sorted(whole))} whole (adapter.modules_to_save)")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        found.append(f"its init_lora_weights {init!r} changed the base before training")
    if config.get("task_type") not in (None, "", "CAUSAL_LM"):
        found.append(f"its task is {config['task_type']}, and it is no language model")
    # The tensors of the last four are named above.
    known = _EXPRESSIBLE | {"trainable_token_indices", "use_dora", "bias", "modules_to_save"}
    odd = sorted(key for key, value in config.items() if key not in known and value and value != _DEFAULTS.get(key))
    if odd:
        found.append(f"{PEFT_CONFIG_FILE} uses {', '.join(odd)}")
    return found


def describe_use(folder: Path) -> str:
    """Return one sentence on what other programs can do with the adapter of a run."""
    if obstacles := [*list_obstacles(folder), *_list_changes_of_base(open_result(folder))]:
        return (
            f"only PEFT can apply this adapter: {'; '.join(obstacles)}. vLLM and llama.cpp refuse it as an adapter; "
            "give them the merged export"
        )
    rank = max(_list_ranks(folder))
    return f"`finetune export RUN --adapter` writes this adapter as plain LoRA of rank {rank}{_describe_limit(rank)}"


def _describe_limit(rank: int) -> str:
    if rank <= _SERVED_RANK:
        return ""
    limit = next((limit for limit in _RANK_LIMITS if limit >= rank), None)
    if limit is None:
        return f"; vLLM takes ranks up to {_RANK_LIMITS[-1]}"
    return f"; vLLM takes ranks up to {_SERVED_RANK} unless it is started with --max-lora-rank {limit}"


def _list_ranks(folder: Path) -> list[int]:
    header = read_header(folder / PEFT_WEIGHTS_FILE)
    return [entry.shape[0] for name, entry in header.items() if name.endswith(".lora_A.weight")]


def write_plain_adapter(result: Result, output: Path) -> AdapterReport:
    """Write the adapter of a run as plain LoRA, with the tokenizer files and the template that it was trained with.

    Raises:
        ExportError: the run has no adapter, or one that cannot be written so; the message says why. No output is left.
        OutputError: the output folder is not empty or cannot be written.
    """
    check_output_free(output)
    source = result.folder
    if not result.is_adapter:
        raise ExportError(
            f"{source}: all weights were trained, so there is no adapter; export the run without --adapter"
        )
    if obstacles := [*list_obstacles(source), *_list_changes_of_base(result)]:
        raise ExportError(
            f"{source}: cannot be written as plain LoRA: {'; '.join(obstacles)}; export the merged model instead (without --adapter)"
        )
    config = read_json(source / PEFT_CONFIG_FILE)
    pairs = _read_pairs(source)
    scales = {module: _find_scale(config, module, len(pair[0])) for module, pair in pairs.items()}
    rank, alpha, plain = _make_plain(pairs, scales)
    with write_folder(output) as folder:
        save_file(_name_tensors(plain), folder / PEFT_WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / PEFT_CONFIG_FILE, _describe_config(config, list(pairs), rank, alpha))
        if result.lineage is not None:
            write_json(folder / LINEAGE_FILE, asdict(result.lineage))
        if (source / TEMPLATE_FILE).is_file():
            copy_tokenizer(source, folder, (source / TEMPLATE_FILE).read_bytes().decode())
        (folder / "README.md").write_text(_make_card(result, config, rank), encoding="utf-8")
        difference = _compare(_read_pairs(folder), alpha / rank, pairs, scales)
        size = (folder / PEFT_WEIGHTS_FILE).stat().st_size
    return AdapterReport(output, rank, alpha, len(pairs), size, difference)


def describe_adapter(report: AdapterReport) -> str:
    """Return the report as text for a person."""
    return (
        f"{report.output}: plain LoRA of rank {report.rank} for {describe_count(report.modules, 'matrix', 'matrices')}, {describe_size(report.bytes)}; "
        f"read back, no number of an update differs by more than {report.max_difference:.1e} of the largest"
        f"{_describe_limit(report.rank)}"
    )


def _list_changes_of_base(result: Result) -> list[str]:
    """Return what a run changed in its base without the adapter, which alone would then not be what was trained."""
    lineage, found = result.lineage, []
    if lineage is not None and lineage.rope_theta is not None:
        found.append(f"it was trained with model.rope_theta {lineage.rope_theta:g}, which its base does not have")
    if lineage is not None and lineage.holds_rounding:
        found.append(
            f"it began with {lineage.init}, so it holds a part of what {lineage.quantize} rounded off its base, and belongs to that "
            "quantized base alone"
        )
    if lineage is not None and lineage.architecture == "native":
        found.append("it was trained on the native architecture, and its factors do not fit the Llama form")
    return found


def _read_pairs(folder: Path) -> dict[str, Pair]:
    """Return LoRA's matrices by module: A with shape (rank, inputs), B with shape (outputs, rank)."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / PEFT_WEIGHTS_FILE).items():
        if found := _PROJECTION.fullmatch(name):
            sides.setdefault(found[1], {})[found[2]] = tensor
    if not sides:
        raise ExportError(f"{folder}: holds no LoRA matrices; give a run or an adapter folder that PEFT wrote")
    for module, pair in sides.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ExportError(
                f"{folder}: {module}: LoRA's A and B do not belong together; train or save the adapter again"
            )
    return {module: (sides[module]["A"], sides[module]["B"]) for module in sorted(sides)}


def _find_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of a module's update, as PEFT computes it. Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732)."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(own, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _make_plain(pairs: Mapping[str, Pair], scales: Mapping[str, float]) -> tuple[int, int, dict[str, Pair]]:
    """Give all modules one rank and one scale; return rank, alpha and the matrices, which give the same updates.

    A smaller rank is filled up with zeros. Alpha must be a whole number for vLLM: where the scale allows none, or differs between
    modules, it is multiplied into B.
    """
    rank = max(len(a) for a, _ in pairs.values())
    common = set(scales.values())
    alpha = next(iter(common)) * rank if len(common) == 1 else 0.0
    keeps_scale = alpha > 0 and alpha == int(alpha)
    plain = {}
    for module, (a, b) in pairs.items():
        missing = rank - len(a)
        factor = 1.0 if keeps_scale else scales[module]
        wider = torch.nn.functional.pad(b.float() * factor, (0, missing)).to(b.dtype)
        plain[module] = (torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous(), wider.contiguous())
    return rank, int(alpha) if keeps_scale else rank, plain


def _name_tensors(pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    sides = (
        (f"base_model.model.{module}.lora_{side}.weight", pair["AB".index(side)])
        for module, pair in pairs.items()
        for side in "AB"
    )
    return dict(sides)


def _describe_config(config: Mapping[str, Any], modules: Sequence[str], rank: int, alpha: int) -> dict[str, Any]:
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    # The names of projections alone would reach every layer.
    is_partial = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    is_whole = isinstance(config.get("target_modules"), list) and not is_partial
    kept = {key: config[key] for key in ("base_model_name_or_path", "revision") if config.get(key)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **kept,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": leaves if is_whole else list(modules),
    }


def _compare(found: Mapping[str, Pair], scale: float, pairs: Mapping[str, Pair], scales: Mapping[str, float]) -> float:
    """Return the largest difference between the updates that were written and the trained ones, as a share of the largest number.

    Raises:
        ExportError: it is more than rounding.
    """
    worst = 0.0
    for module, (a, b) in pairs.items():
        expected = scales[module] * (b.double() @ a.double())
        written = scale * (found[module][1].double() @ found[module][0].double())
        largest = expected.abs().max().item()
        worst = max(worst, (written - expected).abs().max().item() / largest if largest else 0.0)
    if not worst <= _ROUNDING:  # NaN, too
        raise ExportError(
            f"export: the written adapter is not what was trained: an update differs by {worst:.2g} of its largest number; "
            "nothing was left in the output"
        )
    return worst


def _make_card(result: Result, config: Mapping[str, Any], rank: int) -> str:
    lineage = result.lineage
    name = config.get("base_model_name_or_path") or "?" if lineage is None else lineage.checkpoint
    base = f"Its base is the Llama form of that checkpoint: `finetune fold {name} -o base` writes it where the checkpoint is published in another one."
    if lineage is not None and name in (run.run for run in lineage.earlier):  # a run of all weights
        base = f"Its base is what that run trained, not `{lineage.earlier[0].checkpoint}`: `finetune export {name} -o base` writes it."
    quantized = (
        ""
        if lineage is None or lineage.quantize == "none"
        else (
            f"It was trained on the base in {lineage.quantize}; on the full-precision base its answers differ a little.\n\n"
        )
    )
    return (
        f"---\nlibrary_name: peft\npipeline_tag: text-generation\n---\n\n# A LoRA adapter of YuLan-Mini\n\n"
        f"Plain LoRA of rank {rank} for `{name}`{_describe_limit(rank)}. {base}\n\n{quantized}"
        "Opened here by PEFT alone. docs/runtimes.md of the kit says what other programs were tried with.\n"
    )
