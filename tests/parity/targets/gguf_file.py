"""A Qwen3-MoE checkpoint as a GGUF file in fp32, for llama.cpp."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_OF_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Writes the checkpoint's weights and tokenizer."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, checkpoint, config)
    for name, weight in _renamed(load_file(checkpoint / "model.safetensors"), config).items():
        writer.add_tensor(name, weight.float().contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, int]) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
    names = {**{token_id: token for token, token_id in vocab.items()}, **special}
    size = config["vocab_size"]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(token_id, f"[UNUSED{token_id}]") for token_id in range(size)])
    writer.add_token_types(
        [
            kinds.CONTROL
            if token_id in special
            else kinds.NORMAL
            if token_id in names
            else kinds.UNUSED
            for token_id in range(size)
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


def _renamed(weights: dict[str, torch.Tensor], config: dict[str, int]) -> dict[str, torch.Tensor]:
    found = {new: weights[old] for old, new in _OF_MODEL.items()}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"blk.{layer}"
        for name, other in _OF_LAYER.items():
            found[f"{new}.{other}.weight"] = weights[f"{old}.{name}.weight"]
        for name, other in _EXPERTS.items():
            found[f"{new}.{other}.weight"] = torch.stack(
                [
                    weights[f"{old}.mlp.experts.{expert}.{name}.weight"]
                    for expert in range(config["num_experts"])
                ]
            )
    return found
