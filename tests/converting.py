"""Tiny models for the tests of conversion: random weights, and a checkpoint written with DCP as Megatron lays it out."""

import io
import os
from argparse import Namespace

import torch
from megatron.core.transformer.enums import AttnBackend
from tokenizers import Tokenizer, models
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from transformers import PreTrainedTokenizerFast

from tests import reference

LAYERS, HIDDEN, HEADS, GROUPS, HN, FFN, VOCAB, PADDED = 2, 24, 4, 2, 6, 40, 50, 64
PROJECTIONS = ("q", "output_gate", "k", "v", "forget_gate")


def megatron_args(**changes):
    settings = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "kv_channels": HN,
        "ffn_hidden_size": FFN,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "layernorm_epsilon": 1e-6,
        "rotary_base": 10000,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "untie_embeddings_and_output_weights": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "swiglu": False,
        "num_experts": None,
        "attention_backend": AttnBackend.auto,
        "params_dtype": torch.float32,
        "rat_recurrence": True,
        "rat_pattern": "d4w2",
        "rat_eod_id": 2,
    }
    return Namespace(**{**settings, **changes})


def random_weights(untied=False, recurrence=True, swiglu=False):
    """Hugging Face weights by name; the embedding and output projection still have Megatron's padding rows."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (PADDED, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if untied:
        shapes["lm_head.weight"] = (PADDED, HIDDEN)
    widths = {"q": HEADS * HN, "output_gate": HEADS * HN, "k": GROUPS * HN, "v": GROUPS * HN, "forget_gate": GROUPS * HN}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (HIDDEN,), layer + "post_attention_layernorm.weight": (HIDDEN,)}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (widths[p], HIDDEN) for p in PROJECTIONS[: 4 + recurrence]}
        shapes |= {layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HN)}
        shapes |= {layer + "mlp.up_proj.weight": (FFN, HIDDEN), layer + "mlp.down_proj.weight": (HIDDEN, FFN)}
        shapes |= {layer + "mlp.gate_proj.weight": (FFN, HIDDEN)} if swiglu else {}
    return {name: torch.randn(shape) * 0.2 + ("norm" in name) for name, shape in shapes.items()}


def megatron_tensors(weights, stacked=True, fused_norms=False):
    """The same weights under Megatron's keys. Rows of the fused projection are gathered head by head, as the layout is defined."""

    def fused(i):
        rows, per_group = [], HEADS // GROUPS
        for g in range(GROUPS):
            for p in PROJECTIONS:
                weight = weights.get(f"model.layers.{i}.self_attn.{p}_proj.weight")
                if weight is not None:
                    heads = range(g * per_group, (g + 1) * per_group) if p in ("q", "output_gate") else [g]
                    rows += [weight[h * HN : (h + 1) * HN] for h in heads]
        return torch.cat(rows)

    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    norms = norms if fused_norms else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    layers = [
        {
            norms[0]: weights[f"model.layers.{i}.input_layernorm.weight"],
            norms[1]: weights[f"model.layers.{i}.post_attention_layernorm.weight"],
            "self_attention.linear_qkv.weight": fused(i),
            "self_attention.linear_proj.weight": weights[f"model.layers.{i}.self_attn.o_proj.weight"],
            "mlp.linear_fc1.weight": torch.cat([weights[name] for name in _first_of_mlp(i) if name in weights]),
            "mlp.linear_fc2.weight": weights[f"model.layers.{i}.mlp.down_proj.weight"],
        }
        for i in range(LAYERS)
    ]
    tensors = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(HIDDEN),
    }
    if "lm_head.weight" in weights:
        tensors["output_layer.weight"] = weights["lm_head.weight"]
    if stacked:
        return tensors | {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    return tensors | {f"decoder.layers.{i}.{name}": weight for i, layer in enumerate(layers) for name, weight in layer.items()}


def _first_of_mlp(layer):
    return [f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up")]


class _StoreBytesAsTheyAre(DefaultSavePlanner):
    def transform_object(self, write_item, object):
        return object


def write_checkpoint(root, tensors, args, step=20, common=None):
    """As Megatron 0.19 does: DCP with the arguments as an object in it, then metadata.json, then the tracker."""
    folder = root / f"iter_{step:07d}"
    stored = io.BytesIO()
    torch.save([common or {"args": args, "iteration": step, "checkpoint_version": 3.0}], stored)
    extra = {"common_state/shard_0_1": stored, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1": io.BytesIO(b"never read")}
    planner = _StoreBytesAsTheyAre(flatten_state_dict=False)
    save({**tensors, **extra}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))
    return root


def expected_logits(weights, tokens):
    cut = {name: weight[:VOCAB] if name in ("model.embed_tokens.weight", "lm_head.weight") else weight for name, weight in weights.items()}
    return reference.model(cut, tokens, HEADS, GROUPS, lambda layer, head, t, j: reference.sees(t, j, 4, 2))


def write_tokenizer(folder):
    words = {"<s>": 1, "</s>": 3, "<unk>": 0, **{f"w{i}": i for i in range(4, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
