"""Load an exported RAT+ model with Transformers alone and continue a prompt under two attention patterns.

python examples/generate.py FOLDER "PROMPT"
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)

for pattern in (model.config.attention_pattern, "dense"):
    model.set_attention_pattern(pattern)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(f"  {pattern:>6}: {tokenizer.decode(output[0], skip_special_tokens=True)!r}")
