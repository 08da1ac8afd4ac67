"""Say in a GGUF file's header what llama.cpp must know of a model: sizes, RoPE, vocabulary and chat template.

Source: github.com/ggml-org/ggml, docs/gguf.md; llama.cpp, convert_hf_to_gguf.py.
"""

from gguf import GGML_QUANT_VERSION, GGUFWriter, RopeScalingType, TokenType

from finetune.exporting.gguf.llama_folder import LlamaFolder, remove_training_marks
from finetune.exporting.gguf.tensor_types import TensorType
from finetune.yulan.llama_files import read_rope


def add_metadata(writer: GGUFWriter, source: LlamaFolder, chosen: TensorType) -> None:
    """Add every key but the architecture, which the writer adds itself."""
    writer.add_type("model")
    writer.add_name("YuLan-Mini, fine-tuned")
    writer.add_file_type(int(chosen.file_type))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_sizes(writer, source)
    _add_vocabulary(writer, source)
    if source.form.source is not None:
        writer.add_chat_template(remove_training_marks(source.form.source))


def _add_sizes(writer: GGUFWriter, source: LlamaFolder) -> None:
    config, heads = source.config, source.config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(source.context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(source.head_dim)
    rope = read_rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_vocabulary(writer: GGUFWriter, source: LlamaFolder) -> None:
    words, tokenizer = source.vocabulary, source.tokenizer
    # The table may have more rows than the tokenizer has tokens. llama.cpp wants a token for each.
    unused = range(len(words.pieces), source.config["vocab_size"])
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.words)
    writer.add_token_list([*words.pieces, *(f"[PAD{number}]" for number in unused)])
    writer.add_token_scores([*words.scores, *(0.0 for _ in unused)])
    writer.add_token_types([*words.types, *(TokenType.UNUSED for _ in unused)])
    writer.add_token_merges(words.merges)
    writer.add_add_space_prefix(words.adds_space)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_eos_token(words.adds_eos)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    # The ends of a turn and of a message stop generation beside eos. A Modelfile names any others, too.
    others = [number for number in source.stop_tokens if number != tokenizer.eos_token_id]
    for number, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)
