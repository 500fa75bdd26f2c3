"""The README.md of an exported model: how to load it, what it was trained with, and what was measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from rat_megatron.hf import RatPlusConfig
from rat_megatron.ratplus.pattern import AttentionPattern

_HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- rat-plus
- sparse-attention
- dilated-attention
---

# {title}

{model}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")
model.set_attention_pattern("{pattern}")
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=32)[0]))
```

## Attention patterns

A query sees itself and the earlier keys that the pattern names: `dense` all of them, `d16` every 16th, `d16w256s4` also the 256
previous and the first 4, `[dense,d64]*12` one pattern a layer, `{{dense*4,d64*12}}` one a head, `d64k8` the 8 best blocks of 64,
`snap1024w32` all keys of a prompt and behind it 1024 of them. The model starts with `{pattern}`; `model.set_attention_pattern(WORD)`
changes it at any time. For a pattern it was not trained with, a short adaptation run comes first.

## Further

`AutoModelForSequenceClassification` and `AutoModelForTokenClassification` load this folder too, with a new classifier. For LoRA with
`peft`, which does not know this model, name the layers: `LoraConfig(target_modules="all-linear")`, or `["q_proj", "v_proj"]`.
`generate()` takes `prompt_lookup_num_tokens` and `assistant_model`. For attention weights (`output_attentions=True`) load it with
`attn_implementation="eager"`.
"""


def recipe_of(args: Namespace) -> dict[str, str]:
    """What the arguments of a training run say about it, by heading; of what they do not say nothing."""

    def get(name: str) -> Any:
        return getattr(args, name, None) or None

    batch, length, steps, samples = get("global_batch_size"), get("seq_length"), get("train_iters"), get("consumed_train_samples")
    recipe = {}
    if samples and length:
        recipe["Tokens"] = f"{samples * length:,}"
    grows = get("step_batch_size_schedule")
    if batch and length:
        recipe["Batch"] = f"{'growing to ' if grows else ''}{batch} sequences of {length} tokens"
    if steps:
        iteration, consumed = get("rat_resumed") or (0, 0)  # before which the batch may have been another
        done = f", {iteration + (samples - consumed) // batch:,} done" if samples and batch and not grows else ""
        recipe["Steps"] = f"{steps:,} planned{done}"
    if get("lr"):
        schedule = f", {args.lr_decay_style} to {args.min_lr:g}" if get("lr_decay_style") and get("min_lr") is not None else ""
        recipe["Learning rate"] = f"{args.lr:g} at its peak{schedule}{_warmup(get)}"
    if get("optimizer") == "adam" and get("adam_beta1") and get("adam_beta2"):
        decay, clip = get("weight_decay") or 0.0, get("clip_grad") or 0.0
        recipe["Optimizer"] = (
            f"AdamW, betas {args.adam_beta1:g} and {args.adam_beta2:g}, weight decay {decay:g}, gradient clipping {clip:g}"
        )
    if samples:
        recipe["Trained with"] = f"pattern `{args.rat_pattern}`"
        if get("rat_arl_pattern") not in (None, "none"):
            recipe["Trained with"] += f", and each batch first under `{args.rat_arl_pattern}` (active recurrence learning)"
        if iterations := get("rat_averaged_iterations"):
            recipe["Weights"] = f"mean of those after {', '.join(f'{step:,}' for step in iterations)} steps"
        recipe["Start"] = "adapted from pretrained weights" if get("pretrained_checkpoint") else "pretrained from scratch"
    return recipe


def measured_losses(folder: Path, args: Namespace) -> dict[str, float]:
    """Validation losses by pattern, and set where there are several, from the run's report.json.

    Only if they are those of this iteration and of this model."""
    try:
        report = json.loads((folder.parent / "report.json").read_text())
        if folder.name != f"iter_{report['iteration']:07d}" or _shortest(report["pattern"], args) != _shortest(args.rat_pattern, args):
            return {}
        sets = report.get("validation_sets") or {"": report["patterns"]}
        return {
            _shortest(word, args) + (f" on {name}" if name else ""): float(loss)
            for name, losses in sets.items()
            for word, loss in losses.items()
            if loss is not None  # it was not finite
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # never evaluated, or not by this program: the card says nothing then


def write_model_card(folder: Path, config: RatPlusConfig, recipe: dict[str, str], losses: dict[str, float]) -> None:
    """Writes README.md. ``losses`` maps pattern words to measured validation losses; without any the card has no such table."""
    kind = "RAT+" if config.use_recurrence else "Plain-attention baseline of RAT+"
    size = f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}"
    what = "whose keys and values pass through a gated recurrence before attention" if config.use_recurrence else "without its recurrence"
    card = _HEAD.format(
        title=f"{kind}, {config.num_hidden_layers} layers, width {config.hidden_size}",
        model=f"A [RAT+](https://arxiv.org/abs/2602.18196) language model, {what}: {size}, vocabulary {config.vocab_size}, "
        f"up to {config.max_position_embeddings} positions.",
        pattern=config.attention_pattern,
    )
    if recipe:
        card += "\n## Recipe\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in recipe.items())
    if losses:
        card += "\n## Validation loss\n\n| pattern | loss |\n|---|---|\n"
        card += "".join(f"| `{word}` | {loss:.4f} |\n" for word, loss in losses.items())
    (folder / "README.md").write_text(card)


def _shortest(word: str, args: Namespace) -> str:
    return str(AttentionPattern.parse(word).fit(args.num_layers, args.num_attention_heads))


def _warmup(get: Any) -> str:
    if get("lr_warmup_fraction"):
        return f", warm-up {get('lr_warmup_fraction'):.3g} of the steps"
    return f", warm-up {get('lr_warmup_iters'):,} steps" if get("lr_warmup_iters") else ""
