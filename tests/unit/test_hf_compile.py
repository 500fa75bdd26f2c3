"""Prefill and decoding under torch.compile, in a process of its own: Megatron on the CPU turns compilation off for good."""

import os
import subprocess
import sys

import pytest
import torch

from rat_megatron.hf import RatPlusCache
from tests.helpers import REPOSITORY
from tests.unit.test_hf_generate import pad, random_tokens, tiny_model

pytestmark = pytest.mark.slow


def test_decoding_is_one_graph_for_all_steps():
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-m", "tests.unit.test_hf_compile", "dense", "d4w2s1", "d4k3", "snap8w2"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def check(pattern: str) -> None:
    model, (ids, mask), rest = tiny_model(pattern), pad([random_tokens(n) for n in (5, 13)]), random_tokens(2, 12)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend=count, fullgraph=True)
    cache, plain_cache = RatPlusCache(40), RatPlusCache(40)
    logits = [compiled(ids, attention_mask=mask, past_key_values=cache).logits]
    expected = [model(ids, attention_mask=mask, past_key_values=plain_cache).logits]
    assert len(graphs) == 1
    for token in rest.split(1, dim=1):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits.append(compiled(token, attention_mask=mask, past_key_values=cache).logits)
        expected.append(model(token, attention_mask=mask, past_key_values=plain_cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), torch.cat(expected, dim=1), rtol=0, atol=1e-5)
    assert 2 <= len(graphs) <= 3, "decoding compiles anew as it goes on"


if __name__ == "__main__":
    for word in sys.argv[1:]:
        check(word)
