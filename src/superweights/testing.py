"""Tiny random checkpoints of any causal language model family that the installed transformers offers.

Code that claims to work on every family needs every family at hand. A family is named by its `model_type`. Its config
class says which fields it has; every field that is known to be a size is made small. The families for which this gives
no valid model have a row in `_exceptions`, with the reason. Nothing is downloaded, and the same seed gives the same bytes.
A super weight can be planted in all that can hold one, to test whatever is meant to find or to keep it.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from superweights.coordinates import Coordinate
from superweights.detection.search import default_prompts
from superweights.errors import UnknownNameError, UnsupportedArchitectureError, UsageError
from superweights.model.loading import load
from superweights.model.tracing import trace

PROMISED_FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi", "phi3", "gpt2"),
    *("gpt_neox", "gptj", "opt", "falcon", "bloom", "mpt", "stablelm", "granite", "cohere", "mixtral", "qwen2_moe"),
    *("qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text"),
)
"""The families that superweights promises to serve; further ones work as docs/architectures.md says."""

_HEADS = 4
_WEIGHT_STD = 0.02

# What a config field with this name means. A name that is in no row keeps its default.
_MEANINGS = {
    "layers": "num_hidden_layers num_layers n_layers n_layer num_blocks decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers",
    "hidden": "hidden_size n_embd d_model dim emb_dim embedding_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim attention_hidden_size lru_width hidden_size_global",
    "intermediate": "intermediate_size n_inner d_inner dff dim_ff ffn_dim ffn_hidden_size feed_forward_size "
    "decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp dense_intermediate_size",
    "expert_intermediate": "moe_intermediate_size expert_ffn_hidden_size",
    "shared_intermediate": "shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size",
    "vocab": "vocab_size vocab_size_per_layer_input",
    "heads": "num_attention_heads attention_heads num_heads n_heads n_head decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
    "linear_num_heads linear_num_value_heads",
    "kv_heads": "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "index_n_heads",
    "head": "head_dim d_head dim_head attention_head_size kv_channels swa_head_dim v_head_dim qk_nope_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim global_head_dim",
    "rotary": "qk_rope_head_dim rotary_dim",
    "rank": "q_lora_rank o_lora_rank kv_lora_rank laurel_rank hidden_size_per_layer_input hc_lowrank adapter_rank "
    "router_hidden_size",
    "experts": "num_experts n_routed_experts num_local_experts moe_num_experts",
    "experts_per_token": "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k",
    "one": "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups n_shared_experts "
    "num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers",
    "none": "num_nextn_predict_layers num_mtp_layers num_kv_shared_layers",
    "state": "state_size ssm_state_size mamba_d_state mamba_d_head mamba_head_dim mamba_headdim chunk_size "
    "mamba_chunk_size block_size",
    "state_heads": "mamba_n_heads mamba_num_heads n_mamba_heads",
    "state_width": "mamba_d_ssm",
    "positions": "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "max_source_positions",
    "window": "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size "
    "local_attention index_topk",
}
_MEANING = {name: meaning for meaning, names in _MEANINGS.items() for name in names.split()}
# Sizes that a class leaves open in its defaults and then derives, or needs and does not have.
_SET_WHEN_OPEN = {
    "num_key_value_heads",
    "head_dim",
    "n_inner",
    "intermediate_size",
    "ffn_hidden_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
}
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OTHER_TOKEN_ID = 3

_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_TEXT = "\n\t" + "".join(map(chr, range(32, 127)))

_DRAFTER = "it drafts from the hidden states and the cache of another model and cannot run on tokens alone"
_AUDIO = "it continues audio codes, several per step, and not text"
_NO_LANGUAGE_MODEL = {
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}


def causal_lm_families() -> list[str]:
    """All model types of the installed transformers that have a causal language model class, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(
    model_type: str, *, layers: int = 6, hidden: int = 64, intermediate: int = 112, vocab: int = 128, **changes: Any
) -> PreTrainedConfig:
    """A small valid config of one family; of its language part where the family also sees or hears.

    The defaults give shapes that cannot be confused: hidden 64, intermediate 112, expert intermediate 48, shared expert
    intermediate 80. Where a family counts its leading dense layers, layer 0 is dense and the others hold experts.

    Args:
        model_type: One of `causal_lm_families()`.
        layers: Decoder layers. Families that mix attention with another kind of layer need 6 to have both.
        hidden: Hidden size, a multiple of 32.
        intermediate: Intermediate size of dense layers, where the family has such a field.
        vocab: Vocabulary size; special tokens are <pad> 0, <s> 1, </s> 2.
        changes: Further fields of the family's config class, by their name there.

    Raises:
        UnknownNameError: transformers has no causal language model of that type.
        UnsupportedArchitectureError: the type has such a class, but it is no model that reads tokens.

    Example:
        >>> config = tiny_config("mixtral", layers=2)
        >>> config.num_hidden_layers, config.hidden_size, config.num_local_experts
        (2, 64, 4)
    """
    config_class = _language_config_class(model_type)
    sizes = _sizes(layers=layers, hidden=hidden, intermediate=intermediate, vocab=vocab)
    row = _exceptions(layers, hidden).get(config_class.model_type, {})
    return config_class(**_merged(_merged(_small_fields(config_class, sizes), row), changes))


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model of one family, in eval mode; every matrix is finite and none is all zero.

    Args:
        model_type: One of `causal_lm_families()`.
        seed: Seed of the weights; the caller's random state is left alone.
        dtype: Floating dtype of the weights.
        changes: Passed to `tiny_config`.

    Raises:
        UnknownNameError: transformers has no causal language model of that type.
        UnsupportedArchitectureError: the type has such a class, but it is no model that reads tokens.
    """
    config = tiny_config(model_type, **changes)
    family = type(config) if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else CONFIG_MAPPING[model_type]
    with _repeatable(seed):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[family]._from_config(config, dtype=dtype)
        _fill_degenerate(model)
    return model.eval()


def tiny_tokenizer(vocab: int = 128) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, which puts <s> before every sequence.

    Printable ASCII, newline and tab come first and always decode to themselves. Other bytes follow as far as `vocab` has
    room (260 holds all); those without a token become <unk>.

    Raises:
        UsageError: `vocab` has no room for ASCII.
    """
    smallest = len(_SPECIAL_TOKENS) + len(_TEXT)
    if vocab < smallest:
        raise UsageError(f"A tiny tokenizer needs a vocabulary of at least {smallest}, not {vocab}: ASCII must fit.")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ascii_tokens = [split.pre_tokenize_str(character)[0][0] for character in _TEXT]
    others = sorted(set(split.alphabet()) - set(ascii_tokens))
    tokens = [*_SPECIAL_TOKENS.values(), *ascii_tokens, *others][:vocab]
    # Byte level, because AutoTokenizer rebuilds the tokenizer of some families (qwen2) with its own byte-level splitter.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", "<s> $A <s> $B", [("<s>", _TOKEN_IDS["bos_token_id"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL_TOKENS)


def save_tiny_checkpoint(
    model_type: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    **changes: Any,
) -> Path:
    """Writes a tiny model as safetensors, with a tokenizer, and gives the directory back.

    Args:
        model_type: One of `causal_lm_families()`.
        directory: Where to write; made when missing.
        seed: Seed of the weights.
        dtype: Floating dtype of the stored weights.
        shards: Whether to write several files and an index instead of one file.
        changes: Passed to `tiny_config`.

    Raises:
        UnknownNameError: transformers has no causal language model of that type.
        UnsupportedArchitectureError: the type has such a class, but it is no model that reads tokens.
        UsageError: the vocabulary is too small for a tokenizer.
    """
    model = tiny_model(model_type, seed=seed, dtype=dtype, **changes)
    tokenizer = tiny_tokenizer(model.config.vocab_size)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with _silent():
        model.save_pretrained(directory, max_shard_size=size // 3 if shards else 2 * size)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # The Auto classes know such a language part only from inside the family's own config.
        CONFIG_MAPPING[model_type](text_config=model.config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def save_planted_checkpoint(
    directory: str | Path,
    *,
    model_type: str = "llama",
    layer: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Coordinate:
    """Writes a tiny random model with one planted super weight, and its tokenizer; gives the coordinate.

    Args:
        directory: where to; made when missing.
        model_type: family, as `causal_lm_families` lists them.
        layer: decoder layer of the super weight.
        seed: draws the weights and the row.
        dtype: dtype of the stored weights.
    """
    model = tiny_model(model_type, seed=seed)
    tokenizer = tiny_tokenizer()
    coordinate = plant_super_weight(model, layer=layer, tokenizer=tokenizer, seed=seed)
    with _silent():
        model.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return coordinate


@torch.no_grad()
def plant_super_weight(
    model: PreTrainedModel,
    *,
    layer: int,
    tokenizer: Any = None,
    routed: bool = True,
    ratio: float = 200.0,
    seed: int = 0,
) -> Coordinate:
    """Makes one weight of a down projection a super weight, in place: its product becomes a super activation.

    The col is the neuron that fires most over the default prompts, the row is drawn. The weight is set so that the residual
    stream reaches `ratio` medians there. Where a norm between down projection and stream holds that back, its gain for the
    channel is raised as well, as trained Gemma models do.

    Args:
        model: a model in memory, in float32.
        layer: decoder layer, from 0.
        tokenizer: its tokenizer; None for fixed token ids.
        routed: take a routed expert where the layer has both routed and plain projections.
        ratio: size of the super activation in medians of the stream.
        seed: draws the row.

    Returns:
        Where the super weight is.

    Raises:
        UsageError: the layer has no down projection, or the stream does not follow the weight or does not hold.
    """
    with load(model, tokenizer=tokenizer) as loaded:
        prompts = default_prompts(loaded)
        before = trace(loaded, prompts)
        projections = loaded.architecture.in_layer(layer)
        if not projections:
            raise UsageError(f"Planting in layer {layer} of {type(model).__name__}: the layer has no down projection.")
        projection = max(projections, key=lambda each: (each.experts is not None) == routed)
        inputs = [each for each in before.peaks if each.module == projection.module and each.side == "input"]
        peak = max(inputs, key=lambda each: abs(each.value))
        row = random.Random(seed).randrange(projection.rows)
        coordinate = Coordinate(layer, peak.expert, row, peak.channel)
        position = before.positions.index((peak.prompt, peak.token))
        target = ratio * before.medians.max().item()

        def reached() -> float:
            return trace(loaded, prompts, last_layer=layer).stream[-1, position, row].item()

        weight, index = model.get_parameter(projection.name), projection.index(coordinate)
        weight[index] = 0
        start = reached()
        weight[index] = target / peak.value
        weight[index] *= target / max(abs(reached() - start), target / 100)  # a multiplier may stand in between
        if abs(reached()) < target / 2:
            _raise_gain(loaded.layer(layer), row, reached, target)
        after = trace(loaded, prompts).stream[layer + 1 :, position, row].abs()
    if after[0] < target / 2 or after[1:].min() < after[0] / 2:
        raise UsageError(
            f"Planting at {coordinate} of {type(model).__name__}: the stream does not follow or does not hold the value, as "
            "where it is normalised after every layer."
        )
    return coordinate


def _language_config_class(model_type: str) -> type[PreTrainedConfig]:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnknownNameError.among("causal language model family", model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type in _NO_LANGUAGE_MODEL:
        raise UnsupportedArchitectureError(
            f"Cannot build a tiny {model_type}: {_NO_LANGUAGE_MODEL[model_type]}. Choose another of causal_lm_families()."
        )
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    part = (config_class.sub_configs_defaults or {}).get("text_config")
    if part is not None:
        # AutoConfig, which has no model type of its own, stands for the class of the part's model type.
        config_class = (
            part.config_class if hasattr(part.config_class, "model_type") else CONFIG_MAPPING[part.model_type]
        )
    return config_class


def _sizes(*, layers: int, hidden: int, intermediate: int, vocab: int) -> dict[str, int]:
    head = hidden // _HEADS
    return {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "expert_intermediate": 48,
        "shared_intermediate": 80,
        "vocab": vocab,
        "heads": _HEADS,
        "kv_heads": _HEADS // 2,
        "head": head,
        "rotary": head // 2,
        "rank": 24,
        "experts": 4,
        "experts_per_token": 2,
        "one": 1,
        "none": 0,
        "state": 16,
        "state_heads": 2 * hidden // 16,
        "state_width": 2 * hidden,
        "positions": 64,
        "window": 8,
    }


def _small_fields(config_class: type[PreTrainedConfig], sizes: dict[str, int]) -> dict[str, Any]:
    """The fields of a config class that must not keep their default, with their small values."""
    defaults = {field.name: _default(field) for field in fields(config_class)}
    small: dict[str, Any] = {}
    for name, default in defaults.items():
        value = _small_value(name, default, sizes)
        if value is not None:
            small[name] = value
    if "kv_lora_rank" in defaults:  # latent attention: one key and value per head, and head_dim means the rotary part
        small |= {"num_key_value_heads": _HEADS, "head_dim": sizes["rotary"]}
    if "rope_parameters" in defaults:  # computed positions take no room, and scaled ones rely on the default
        small.pop("max_position_embeddings", None)
    for name, part in config_class.sub_configs.items():
        if hasattr(part, "model_type"):
            small[name] = _small_fields(part, sizes)
    return small


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _small_value(name: str, default: Any, sizes: dict[str, int]) -> Any:
    """What a field must be, or None to keep its default."""
    if name in _TOKEN_IDS:
        return _TOKEN_IDS[name]
    if name.endswith("_token_id") and default is not None:
        return _OTHER_TOKEN_ID
    if name == "is_decoder":
        return True
    if name in _MEANING and (type(default) is int or name in _SET_WHEN_OPEN):
        return sizes[_MEANING[name]]
    if isinstance(default, list | tuple) and len(default) > sizes["layers"]:
        return list(default)[: sizes["layers"]]
    return None


def _merged(fields_below: dict[str, Any], fields_above: dict[str, Any]) -> dict[str, Any]:
    """Both, where the second wins; parts of a config are merged, not replaced."""
    merged = dict(fields_below)
    for name, value in fields_above.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _cycle(kinds: str, layers: int) -> list[str]:
    each = kinds.split()
    return [each[layer % len(each)] for layer in range(layers)]


def _exceptions(layers: int, hidden: int) -> dict[str, dict[str, Any]]:
    """What the sizes alone do not settle, by the config class's own model type; the reason stands above each row."""
    return {
        # No layer attends by default.
        "bamba": {"attn_layer_indices": [layers // 2]},
        "granitemoehybrid": {"layer_types": _cycle("linear_attention full_attention", layers)},
        # Block-sparse attention falls back, with a warning, below some hundred tokens.
        "big_bird": {"attention_type": "original_full"},
        # The hash table alone has millions of rows, and the class cannot build a cache from its own config.
        "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False},
        # The default has no rotary base for its own layer type.
        "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        # The attention part reads a rotary base that its config class does not declare, and must have a clip.
        "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
        # Sizes of the sliding layers go by names that are no fields.
        "dots3_note_text": {
            "swa_num_attention_heads": _HEADS,
            "swa_num_key_value_heads": _HEADS,
            "swa_q_lora_rank": 24,
            "swa_kv_lora_rank": 24,
            "swa_head_dim": 3 * hidden // (2 * _HEADS),
            "swa_qk_nope_head_dim": hidden // _HEADS,
            "swa_v_head_dim": hidden // _HEADS,
        },
        # Layer kinds are written out for the default number of layers.
        "gpt_neo": {"attention_types": [[["global"], 1], [["local"], layers - 1]]},
        "nemotron_h": {"layers_block_type": _cycle("linear_attention moe full_attention mlp", layers)},
        "reformer": {"attn_layers": _cycle("local lsh", layers), "axial_pos_embds_dim": [hidden // 4, 3 * hidden // 4]},
        "zamba": {"layers_block_type": _cycle("linear_attention hybrid", layers)},
        "zamba2": {"layers_block_type": _cycle("linear_attention hybrid", layers)},
        # Layer kinds have no default.
        "lfm2_moe": {"layer_types": _cycle("conv full_attention", layers)},
        # Experts that pass their input through, beside the routed ones.
        "longcat_flash": {"zero_expert_num": 2},
        # Heads fill the expanded width, not the hidden size.
        "mamba2": {"num_heads": 2 * _HEADS},
        # Left open at the top, and copied from there into the depth decoder.
        "moshi": {"audio_vocab_size": 32},
        # The audio and vision towers are part of the language model class.
        "phi4_multimodal": {
            "audio_config": {
                "nemo_conv_channels": 16,
                "ext_pw_out_channel": hidden,
                "depthwise_separable_out_channel": hidden,
            },
        },
        # The sparse-attention index has no defaults.
        "qwen4_exp_text": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": hidden // _HEADS,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        },
        # Further embedding tables, of Chinese glyphs and sounds.
        "roc_bert": {
            "shape_vocab_size": 32,
            "shape_embed_dim": 16,
            "pronunciation_vocab_size": 32,
            "pronunciation_embed_dim": 16,
        },
        # Keys are rounded up to the width of values.
        "xlstm": {"qk_dim_factor": 1.0},
        # Adapters are chosen by language.
        "xmod": {"default_language": "en_XX"},
        # The class takes one expert per token only.
        "zaya": {"num_experts_per_tok": 1},
    }


@contextmanager
def _silent() -> Iterator[None]:
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Seeds torch, and makes memory that a class leaves uninitialised NaN instead of whatever was there."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@torch.no_grad()
def _fill_degenerate(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if not parameter.isfinite().all() or (parameter.dim() > 1 and not parameter.any()):
            parameter.normal_(0, _WEIGHT_STD)


def _raise_gain(layer: torch.nn.Module, row: int, reached: Callable[[], float], target: float) -> None:
    """Raises the one norm gain of the layer that the stream's channel `row` follows most, until it reaches the target."""
    gains = [each for each in layer.parameters() if each.dim() == 1 and len(each) > row]
    slopes = []
    for gain in gains:
        start, kept = reached(), gain[row].clone()
        gain[row] += 1
        slopes.append(reached() - start)
        gain[row] = kept
    steepest = max(range(len(gains)), key=lambda each: abs(slopes[each]))
    gains[steepest][row] += (target - abs(reached())) / abs(slopes[steepest])
