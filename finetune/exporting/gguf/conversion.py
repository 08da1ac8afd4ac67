"""Write GGUF files with a Modelfile beside each, prove them, and report."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from finetune.errors import ExportError, OutputError, describe_count
from finetune.exporting.gguf.gguf_file import plan_tensors, write_gguf
from finetune.exporting.gguf.llama_folder import LlamaFolder, open_llama_folder
from finetune.exporting.gguf.read_back import compare_file
from finetune.exporting.gguf.tensor_types import TENSOR_TYPES, TensorType
from finetune.exporting.proof import BINDING, GgufReport, LlamaCppScores
from finetune.files.folders import write_files_together
from finetune.files.sizes import describe_size
from finetune.runs.export_settings import check_gguf_type
from finetune.runs.results import is_result

if TYPE_CHECKING:  # it loads the model libraries, and only a comparison in llama.cpp needs them
    from finetune.exporting.gguf.llama_cpp import LlamaCppProver


@dataclass(frozen=True)
class _OllamaTemplate:
    """A shipped chat template in Ollama's language, and the texts besides stop tokens that end its answers."""

    text: str
    stops: tuple[str, ...] = ()


# Ollama fills in templates of Go, not the Jinja of the file, and puts bos before them. Tools are left out: Go writes JSON with other
# spaces than Jinja's `tojson`, so a model would read other tokens than it was trained with.
OLLAMA_TEMPLATES = {
    "yulan-mini": _OllamaTemplate(
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    # The mark is plain text, which the model writes before the token that ends its answer.
    "chatml": _OllamaTemplate(
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>"
        '{{ if eq .Role "assistant" }}</s>{{ end }}\n{{ end }}<|im_start|>assistant\n',
        ("<|im_end|>",),
    ),
}


def convert_folder(
    folder: Path, output: Path, type_name: str, prover: LlamaCppProver | None = None, *, verify: bool = True
) -> GgufReport:
    """Write a Llama folder as one GGUF file with its Modelfile; both are there, or neither.

    With `verify` the file is read back; with a `prover` it is also run in llama.cpp.

    Raises:
        CheckpointError: the folder is damaged, or no checkpoint.
        ExportError: the type or the tokenizer cannot be written, or the file is not what the folder holds.
        OutputError: the file exists, or cannot be written.
    """
    check_gguf_type(type_name)
    if output.suffix != ".gguf":
        name = output.with_suffix(".gguf").name if output.name not in ("", "..") else "mine.gguf"
        raise OutputError(f"{output}: programs know the format by its ending; name the file {name}")
    if is_result(folder) and not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder}: is a run or an adapter, no folder of weights; `finetune export {folder} -o DIR --gguf {type_name}` merges it "
            "and writes the file"
        )
    with write_files_together([output, name_modelfile(output)]) as partial:
        source = open_llama_folder(folder)
        report = write_file(source, partial / output.name, type_name, prover, verify=verify)
    return replace(report, output=output)


def write_file(
    source: LlamaFolder, file: Path, type_name: str, prover: LlamaCppProver | None, *, verify: bool
) -> GgufReport:
    """Write and prove one file with its Modelfile, in a folder that the caller keeps or removes as a whole.

    Raises:
        ExportError: see `convert_folder`.
    """
    started, chosen = time.monotonic(), TENSOR_TYPES[type_name]
    size = _write_with_progress(file, source, chosen)
    tensors = compare_file(file, source, chosen) if verify else 0
    scores = prover.compare(file, source, chosen) if prover is not None else None
    name_modelfile(file).write_text(make_modelfile(source, file.name), encoding="utf-8")
    return GgufReport(file, type_name, size, round(time.monotonic() - started, 1), tensors, scores)


def _write_with_progress(file: Path, source: LlamaFolder, chosen: TensorType) -> int:
    total = sum(tensor.bytes for tensor in plan_tensors(source, chosen))
    # Small models are written before a person could read the bar.
    with tqdm(
        total=total, desc=file.name, unit="B", unit_scale=True, delay=1.0, leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        return write_gguf(file, source, chosen, bar.update)


def name_modelfile(file: Path) -> Path:
    """Return the Modelfile that lies beside a GGUF file; a folder may hold several."""
    return file.with_suffix(".Modelfile")


def make_modelfile(source: LlamaFolder, file_name: str) -> str:
    """Return a Modelfile for Ollama: where the weights are, what ends an answer, the context, and a template where one is known."""
    name = source.form.template.name if source.form.template is not None else "the tokenizer's own"
    template = OLLAMA_TEMPLATES.get(name)
    stops = source.tokenizer.convert_ids_to_tokens(source.stop_tokens) + list(template.stops if template else ())
    lines = [f"FROM ./{file_name}", *(f'PARAMETER stop "{text}"' for text in stops)]
    lines.append(f"PARAMETER num_ctx {source.context}")
    if template is not None:
        lines += ["# Without tools: Ollama writes their JSON in another way.", f'TEMPLATE """{template.text}"""']
    else:
        lines.append(f"# No template: {name} has no counterpart in Ollama's language here. Write one as TEMPLATE.")
    return "\n".join(lines) + "\n"


def describe_gguf(report: GgufReport) -> str:
    """Return the report as text for a person."""
    lines = [f"{report.output}: {describe_size(report.bytes)} of {report.type} in {report.seconds:.1f} s"]
    if not report.tensors:
        return f"{lines[0]}\nnot compared with what was trained"
    lines.append(
        f"read back: all {describe_count(report.tensors, 'tensor lies', 'tensors lie')} within half a step of {report.type} of their source"
    )
    if report.llama_cpp is None:
        return "\n".join([*lines, f"not run in llama.cpp: no binding is installed (pip install {BINDING})"])
    return "\n".join([*lines, describe_scores(report.llama_cpp)])


def describe_scores(scores: LlamaCppScores) -> str:
    """Return how a file does in llama.cpp, in one sentence."""
    rows = f" and {describe_count(scores.rows, 'trained row')}" if scores.rows else ""
    return (
        f"in llama.cpp (xllamacpp {scores.version}): the tokens of {describe_count(scores.texts, 'text')}{rows} are equal; log-probabilities differ by at most "
        f"{scores.max_abs:.2g} (spread {scores.spread:.2g}), KL {scores.kl:.2g} nats over {scores.contexts} contexts; "
        f"{scores.same_answers} of {scores.answers} greedy answers are equal, {scores.stopped} of {scores.stopped_there} stop by themselves"
    )
