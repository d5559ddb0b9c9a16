"""Names of tensors and sizes in GGUF files, and ours for them.

The architectures `qwen2` and `qwen2moe` pair the units of a head as the published checkpoints do,
so nothing is permuted.
"""

from __future__ import annotations

import re

from qwen2.model.hf_config import DENSE, MIXTURE
from qwen2.model.weights import EMBEDDING, HEAD

ARCHITECTURES = {"qwen2": DENSE, "qwen2moe": MIXTURE}

_TOP = {
    "token_embd.weight": EMBEDDING,
    "output.weight": HEAD,
    "output_norm.weight": "model.norm.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = {  # stacks, which have no `.weight` at their names, see stacks.py
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
MIXTURE_SIZES = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def published_name(name: str) -> str:
    """The published name of one of llama.cpp's; an unknown one stays as it is."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _EXPERTS and layer[3] == "weight":
        return f"model.layers.{layer[1]}.{_EXPERTS[layer[2]]}"
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"
    return _TOP.get(name, name)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a published one, or of a stack (see stacks.py)."""
    top = {ours: theirs for theirs, ours in _TOP.items()}
    if name in top:
        return top[name]
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
    assert layer, name
    modules = {ours: theirs for theirs, ours in (_LAYER | _EXPERTS).items()}
    return f"blk.{layer[1]}.{modules[layer[2]]}{layer[3] or '.weight'}"
