"""Ask a checkpoint or a run on this machine, through the same interface as a server."""

import torch

from finetune.checkpoints.finding import find_checkpoint, fingerprint_checkpoint
from finetune.files.cache import hash_file
from finetune.files.folders import expand_home
from finetune.models.opening import LoadedModel, open_model
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.runs.results import is_result, open_result
from finetune.runs.run_files import PEFT_WEIGHTS_FILE
from finetune.synthesis.endpoints.questioning import Outcome, Request, Written
from finetune.yulan.tensors import list_weight_files

_SEED_DIGITS = 15


class LocalModel:
    """A model of this machine. It is loaded at the first request that the cache does not answer."""

    def __init__(self, section: EndpointSection) -> None:
        self._name = section.model
        self.identity = fingerprint_model(section.model)
        self.concurrency = 1
        self._loaded: LoadedModel | None = None

    def ask(self, request: Request) -> Outcome:
        """Generate an answer; the same request gives the same answer."""
        self._loaded = self._loaded or open_model(self._name)
        turns = [{"role": role, "content": text} for role, text in request.turns]
        seed = int(request.make_key(self.identity)[:_SEED_DIGITS], 16)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reply = self._loaded.answer(turns, request.max_tokens, request.temperature)
        return Written(reply.text, 0, reply.tokens, is_cut=reply.stopped_by == "max_tokens")

    def close(self) -> None:
        """Free the memory of the model."""
        self._loaded = None


def fingerprint_model(name: str) -> str:
    """Return a hash of the weights that a name stands for.

    Raises:
        FinetuneError: there is no such model.
    """
    path = expand_home(name)
    if not (path.is_dir() and is_result(path)):
        return fingerprint_checkpoint(find_checkpoint(name))
    result = open_result(path)
    files = [result.folder / PEFT_WEIGHTS_FILE] if result.is_adapter else list_weight_files(result.folder)
    base = result.lineage.base_fingerprint if result.lineage is not None else ""
    return " ".join([base, *map(hash_file, files)])
