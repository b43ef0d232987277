"""Writes a tiny checkpoint as GGUF by turning around what transformers does when it reads one."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "mistral": "llama"}
"""Where llama.cpp has another name than transformers."""
MORE_KEYS = {
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""What llama.cpp's converter writes as well."""


def write_gguf(
    source: Path,
    to: Path,
    *,
    kind: str = "F32",
    drop: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Writes every tensor at a type, where its rows allow that, else as F32.

    Args:
        source, to: a checkpoint, and the file.
        kind: the type.
        drop: tensors that are left out.
        extra: tensors that are written as well.
        more: metadata, with two underscores for a dot, in place of the config's.
    """
    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(to, architecture)
    said = {f"{architecture}.{key}": value for key, value in metadata(config, architecture).items()}
    for key, value in (said | {key.replace("__", "."): value for key, value in more.items()}).items():
        add(writer, key, value)
    if config.model_type == "falcon":
        add(writer, "falcon.feed_forward_length", config.ffn_hidden_size)
        add(writer, "falcon.attention.layer_norm_epsilon", config.layer_norm_epsilon)
    if config.model_type == "gpt2":
        add(writer, "gpt2.feed_forward_length", config.n_inner)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    state = model.state_dict()
    for name, inside in get_gguf_hf_weights_map(model, processor).items():
        tied = name == "output.weight" and config.tie_word_embeddings
        if tied or name in drop or inside not in state:
            continue
        whole = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        add_tensor(writer, whole, as_stored(processor, name, expert_part(name, state[inside].numpy())), kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def metadata(config: Any, architecture: str) -> dict[str, Any]:
    known = {"num_experts": getattr(config, "num_experts", None)} | config.to_dict()
    known |= {"rope_theta": (getattr(config, "rope_parameters", None) or {}).get("rope_theta")}
    mapping = MORE_KEYS | GGUF_CONFIG_MAPPING[config.model_type.removesuffix("_text")]
    return {key: known[name] for key, name in mapping.items() if name and known.get(name) is not None}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: Any, kind: str) -> None:
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    chosen = gguf.GGMLQuantizationType[kind if values.ndim > 1 and values.shape[-1] % block == 0 else "F32"]
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values, np.float32), chosen), raw_dtype=chosen)


def expert_part(name: str, values: Any) -> Any:
    """Gate and up projections of experts are one tensor in transformers."""
    half = values.shape[1] // 2 if values.ndim == 3 else 0
    return values[:, :half] if "ffn_gate_exps" in name else values[:, half:] if "ffn_up_exps" in name else values


def as_stored(processor: Any, name: str, values: Any) -> Any:
    """What a processor makes these values of, found by letting it move the numbers of the elements."""
    for shape in (values.shape, values.shape[::-1], tuple(each for each in values.shape if each != 1)):
        numbers = np.arange(values.size, dtype=np.float64).reshape(shape)
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        try:
            found = processor.process(weights=numbers, name=name, tensor_key_mapping=None, parsed_parameters=parsed)
        except (ValueError, IndexError):
            continue
        moved = found.weights if found.name else next(iter(parsed["tensors"].values())).numpy()
        if moved.shape != values.shape:
            continue
        if np.array_equal(moved, numbers - 1):
            return values + np.float32(1)
        stored = np.empty(values.size, np.float32)
        stored[moved.ravel().astype(np.int64)] = values.ravel()
        return stored.reshape(shape)
    raise AssertionError(name)
