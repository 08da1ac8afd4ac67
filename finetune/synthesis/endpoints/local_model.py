"""Ask a checkpoint or a run on this machine, through the same interface as a server."""

import torch

from finetune.data.encoding.spellings import list_control_spellings
from finetune.models.opening import LoadedModel, fingerprint_model, open_model
from finetune.recipe.preparation.synthesize_section import EndpointSection
from finetune.synthesis.endpoints.questioning import Outcome, Request, Skip, Written

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
        # Training reads such a text as plain letters, which are other tokens, and more of them, than those that were drawn.
        if any(spelling in reply.text for spelling in list_control_spellings(self._loaded.tokenizer)):
            return Skip("control token as text", reply.text)
        return Written(reply.text, 0, reply.tokens, is_cut=reply.stopped_by == "max_tokens")

    def close(self) -> None:
        """Free the memory of the model."""
        self._loaded = None
