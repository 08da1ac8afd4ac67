"""Patch libraries and use their private names; no other module of the kit does.

The headings name the versions for which the functions were written. `tests/test_compat.py` fails when a name that is used here is
gone, and lists for each function the test that fails when the patch stops working. Libraries are imported inside the functions,
and nothing is patched before one of them is called, so that a recipe can be checked without loading any.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# TRL computes the loss from tiles of 4,096 tokens by so many entries of the vocabulary, and holds one tile at a time. With its own
# width of 32,768 a tile takes 268 MB for any vocabulary; a quarter of that is still wide enough for a matrix product.
LOGIT_COLUMNS = 8192


@contextlib.contextmanager
def replace_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module, a class or an object inside this context.

    Raises:
        AttributeError: there is no such attribute, so the patch would change nothing.
    """
    before = getattr(owner, name)
    is_own = name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# --- TRL 1.16 ---------------------------------------------------------------------------------------------------------


def load_trainer_class(module: str, name: str) -> Any:
    """Return a class of TRL or transformers, without TRL's notice, at ORPO and CPO, that its namespace is experimental."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return getattr(_load(module), name)


def narrow_logit_tiles() -> None:
    """Set the width of TRL's tiles of logits, for which TRL has no option."""
    _load("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE = LOGIT_COLUMNS


def skip_row_preparation(trainer_class: type[Any]) -> type[Any]:
    """Return TRL's trainer class without its preparation of rows, which only the SFT trainer has an option for."""

    def keep(self: Any, dataset: Any, *arguments: Any, **options: Any) -> Any:
        return dataset

    return type(trainer_class.__name__, (trainer_class,), {"_prepare_dataset": keep})


def replace_chat_template(tokenizer: Any, encode: Callable[..., Any]) -> None:
    """Let TRL's online trainers get the tokens of a conversation from `encode`, which does not read control tokens in a question."""
    tokenizer.apply_chat_template = encode


def replace_offloading(trainer: Any, context: Any) -> None:
    """Let a trainer enter another context than TRL's activation offloading, which needs a GPU."""
    trainer.maybe_activation_offload_context = context


def count_tokens(trainer: Any, tokens: int | None = None) -> int | None:
    """Return the tokens that TRL has counted, after setting them where given; None for a trainer that does not count them."""
    if tokens is not None and "_total_train_tokens" in vars(trainer):
        trainer._total_train_tokens = tokens
    counted: int | None = vars(trainer).get("_total_train_tokens")
    return counted


@contextlib.contextmanager
def run_losses_in_place() -> Iterator[None]:
    """Let TRL's losses allocate as on a GPU, where Triton kernels and products with float32 sums work in place."""
    kernels, utils = _load("trl.kernels.chunked_logprob"), _load("trl.trainer.utils")
    with contextlib.ExitStack() as stack:
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            stack.enter_context(replace_attribute(kernels, name, do_nothing))
        stack.enter_context(replace_attribute(utils, "_use_triton", lambda device: True))
        yield


@contextlib.contextmanager
def take_reference_as_known(trainer_module: str, trainer_class: str, columns: Sequence[str]) -> Iterator[None]:
    """Let a preference trainer find the reference model's log-probabilities, which a plan does not compute, as 0 in `columns`."""

    def add_columns(trainer: Any, rows: Any, name: str, batch_size: int) -> Any:
        for column in columns:
            rows = rows.add_column(column, [0.0] * len(rows))
        return rows

    module = _load(trainer_module)
    with (
        replace_attribute(module, "hash_module", lambda model: ""),
        replace_attribute(getattr(module, trainer_class), "_precompute_ref_logps", add_columns),
    ):
        yield


# --- datasets 5.2 -----------------------------------------------------------------------------------------------------


def copy_rows(dataset_class: type[Any], rows: Any) -> Any:
    """Return the rows, in the same order, as an object of a subclass of `datasets.Dataset`; no data is copied."""
    return dataset_class(rows.data, info=rows.info, indices_table=rows._indices, fingerprint=rows._fingerprint)


def read_cache_only(is_away: bool) -> contextlib.AbstractContextManager[None]:
    """Keep datasets from asking a hub that is away, six times in 30 seconds; what its cache holds, it finds without."""
    config = _load("datasets.config")
    return replace_attribute(config, "HF_HUB_OFFLINE", is_away or config.HF_HUB_OFFLINE)


# --- transformers 5.23 ------------------------------------------------------------------------------------------------


def make_without_weights(model_class: Any, config: Any, **options: Any) -> Any:
    """Build a model from a configuration; `from_pretrained` needs weights, and the constructor has no option for attention."""
    return model_class._from_config(config, **options)


def name_attention(config: Any, kernel: str | None = None) -> str:
    """Return the attention kernel of a model, after setting it where given; its layers read this name at each pass."""
    if kernel is not None:  # `set_attn_implementation` takes 6 ms in a model of 4,655 modules
        config._attn_implementation = kernel
    return str(config._attn_implementation)


def use_one_gpu(config: Any) -> None:
    """Keep a trainer that sees several GPUs from wrapping its model in DataParallel, which would train on larger batches."""
    config._n_gpu = min(config.n_gpu, 1)


def watch_numbers(trainer: Any, see_loss: Callable[[Any], Any], see_norm: Callable[[Any], Any]) -> None:
    """Let functions see, and return, the loss of every batch and the gradient norm of every step; callbacks get neither in time."""
    step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_
    trainer.training_step = lambda *arguments, **options: see_loss(step(*arguments, **options))
    trainer.accelerator.clip_grad_norm_ = lambda *arguments, **options: see_norm(clip(*arguments, **options))


def skip_steps(trainer: Any) -> contextlib.AbstractContextManager[None]:
    """Let a trainer load a checkpoint of the last step and end: by itself it trains at least one step (`_run_epoch`)."""
    return replace_attribute(trainer, "_run_epoch", do_nothing)


def build_masks_as_in_run() -> contextlib.AbstractContextManager[None]:
    """Let transformers build or skip attention masks as in a run; for tensors without content it would always build them."""
    return replace_attribute(_load("transformers.masking_utils"), "is_tracing", lambda tensor=None: False)


# --- PEFT 0.21 --------------------------------------------------------------------------------------------------------


def complete_head(tuned: Any) -> Any:
    """Add the attribute `bias` to a head with trained token rows: TRL's loss reads it, and PEFT's wrapper lacks it."""
    head = tuned.get_output_embeddings()
    if isinstance(head, _load("peft.utils.other").TrainableTokensWrapper):
        head.register_parameter("bias", None)
    return tuned


def leave_adapters_in_place() -> contextlib.AbstractContextManager[None]:
    """Let PEFT add an adapter without moving it to the device of its layer: tensors without content cannot be moved."""
    layer = _load("peft.tuners.tuners_utils").BaseTunerLayer
    return replace_attribute(layer, "_move_adapter_to_device_of_base_layer", do_nothing)


# --- bitsandbytes 0.50 ------------------------------------------------------------------------------------------------


def answer_autocast_as_gpu() -> contextlib.AbstractContextManager[None]:
    """Let `torch.is_autocast_enabled()`, which asks for CUDA, tell of the CPU's autocast, which stands for it in a dry run.

    PEFT's quantized layers ask that way, and without autocast they copy their inputs to float32.
    """
    torch = _load("torch")
    ask = torch.is_autocast_enabled
    return replace_attribute(torch, "is_autocast_enabled", lambda device_type="cpu": ask(device_type))


def keep_weights_differentiable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation, for a kernel of AVX512-BF16 without a gradient.

    Training would fail, or continue without gradients for earlier layers (`Linear4bit.forward`).
    """
    layer = _load("bitsandbytes.nn").Linear4bit
    for module in model.modules():
        if isinstance(module, layer):
            module.support_avx512bf16_for_cpu = False


def replace_loading(optimizer: Any, load: Callable[..., None]) -> None:
    """Let another function load an optimizer's state; the method of bitsandbytes' optimizers calls no hooks."""
    optimizer.load_state_dict = load


# --- accelerate 1.15 --------------------------------------------------------------------------------------------------


def shard_on_cpu(precision: str) -> None:
    """Let FSDP2 shard on the CPU too; `precision` is `no`, `bf16` or `fp16`.

    accelerate reads FSDP's settings for GPUs only and would silently keep whole copies, though torch can shard over gloo
    (`AcceleratorState.__init__`).
    """
    states, utils = _load("accelerate.state"), _load("accelerate.utils")
    plugin = utils.FullyShardedDataParallelPlugin()
    state = states.AcceleratorState(
        precision, cpu=True, dynamo_plugin=utils.TorchDynamoPlugin(), _from_accelerator=True
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
    state.fsdp_plugin = plugin
    state.distributed_type = states.PartialState._shared_state["distributed_type"] = utils.DistributedType.FSDP


def wrap_backward(trainer: Any, wrap: Callable[[Any], Any]) -> contextlib.AbstractContextManager[None]:
    """Wrap the function with which a trainer starts its backward passes; there is no callback for that moment."""
    return replace_attribute(trainer.accelerator, "backward", wrap(trainer.accelerator.backward))


# --- torch 2.13 -------------------------------------------------------------------------------------------------------


def load_fake_tensors() -> tuple[Any, Any]:
    """Return torch's class of tensors without content and the mode that makes them, which are private."""
    module = _load("torch._subclasses.fake_tensor")
    return module.FakeTensor, module.FakeTensorMode


def leave_all_modes() -> contextlib.AbstractContextManager[Any]:
    """Return a context that suspends all dispatch modes, so that new tensors have content again."""
    context: contextlib.AbstractContextManager[Any] = _load("torch.utils._python_dispatch")._disable_current_modes()
    return context


def identify_storage(storage: Any) -> int:
    """Return the number of a tensor's storage, which tensors that share it have in common; without content it has no address."""
    return int(storage._cdata)


class Operations(NamedTuple):
    """Operations of torch's own library that have private names."""

    attention_backward: Any
    read_number: Any
    unsafe_view: Any


def load_operations() -> Operations:
    """Return what a CPU runs for FlashAttention's backward pass, what reads a number out of a tensor, and a view."""
    aten = _load("torch").ops.aten
    return Operations(
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten._local_scalar_dense.default,
        aten._unsafe_view.default,
    )


def load_dispatch_mode() -> type[Any]:
    """Return a base class for modes that see every operation, without torch's guard against compiling, a third of each call."""
    mode = _load("torch.utils._python_dispatch").TorchDispatchMode
    return type("DispatchMode", (mode,), {"_should_skip_dynamo": classmethod(lambda cls: False)})


def copy_each(targets: list[Any], sources: list[Any]) -> None:
    """Copy tensors into others, also of another type, with one kernel for many on a GPU, as torch's optimizers do."""
    _load("torch")._foreach_copy_(targets, sources)


def find_share(shape: Any, mesh: Any, placements: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return shape and offset of this process's share of a sharded tensor."""
    module = _load("torch.distributed.tensor._utils")
    found: tuple[Sequence[int], Sequence[int]] = module.compute_local_shape_and_global_offset(shape, mesh, placements)
    return found


def keep_in_place(model: Any) -> None:
    """Let `model.to` do nothing, since tensors without content cannot be moved."""
    model.to = lambda *arguments, **options: model


def keep_gradients(model: Any) -> None:
    """Let `model.zero_grad` do nothing: a trainer would clear the gradients with which the step of a plan begins."""
    model.zero_grad = do_nothing


def do_nothing(*arguments: Any, **options: Any) -> None:
    """Replace a function that works in place or is not needed."""


def _load(module: str) -> Any:
    return importlib.import_module(module)
