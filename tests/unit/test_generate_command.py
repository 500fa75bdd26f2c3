"""`rat-megatron generate`: what is streamed equals generate(), turns reuse the cache, and bad input is one sentence."""

import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rat_megatron.cli.main import app
from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import exit_2_on_bad_input
from rat_megatron.evaluation import generator
from rat_megatron.evaluation.generator import Generator, Settings
from rat_megatron.evaluation.model import load_model
from rat_megatron.hf import RatPlusForCausalLM
from rat_megatron.ratplus.pattern import AttentionPattern
from tests.evaluating import save_tiny_model
from tests.preparing import EOD

torch.set_num_threads(1)  # at these sizes threads only wait for each other
PROMPT = "A river ran through the valley, and"
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", attention_pattern="d4")


def run(*arguments, stdin=None):
    """Result of `rat-megatron generate ...` run in this process."""
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def expected_text(folder, pattern, prompt=PROMPT, **options):
    """What generate() gives for the same settings, in one piece."""
    model, tokenizer = RatPlusForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model.set_attention_pattern(pattern)
    output = model.generate(ids, **{"do_sample": False, "pad_token_id": EOD, **options})
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("pattern", [None, "dense", "d8w4s2"])
def test_stdout_has_the_continuation_and_nothing_else(folder, pattern):
    result = run(folder, PROMPT, "--max-new-tokens", 24, *(["--pattern", pattern] if pattern else []))
    assert result.exit_code == 0, result.output
    assert result.stdout.removesuffix("\n") == expected_text(folder, pattern or "d4", max_new_tokens=24)
    assert re.search(r"prefill: 35 tokens, [\d,.]+ tokens/s; decode: 23 tokens, [\d,.]+ tokens/s", result.stderr)


def test_patterns_give_different_texts(folder):
    assert expected_text(folder, "dense", max_new_tokens=24) != expected_text(folder, "d8w4s2", max_new_tokens=24)


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_may_come_from_stdin(folder, arguments):
    result = run(folder, *arguments, "--max-new-tokens", 8, stdin=PROMPT + "\n")
    assert result.stdout.removesuffix("\n") == expected_text(folder, "d4", max_new_tokens=8)


def test_cache_sizes_are_those_of_the_pattern_and_of_dense(folder):
    stderr = run(folder, PROMPT, "--pattern", "d8w4s2", "--max-new-tokens", 29).stderr
    length, sparse, dense = (
        int(n.replace(",", "")) for n in re.search(r"cache of (\d+) tokens: ([\d,]+) bytes .* ([\d,]+) if", stderr).groups()
    )
    state = 2 * 2 * 32 * 4  # layers, keys and values, hidden size, fp32
    assert length == 64
    assert dense == 64 * 2 * 2 * 32 * 4 + state
    assert sparse <= AttentionPattern.parse("d8w4s2").cache_entries(64, 2, 4) * 2 * 8 * 4 + state < dense / 3


def test_what_is_drawn_depends_on_the_seed(folder):
    texts = [run(folder, PROMPT, "--temperature", 1, "--seed", seed, "--max-new-tokens", 16).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = run(folder, PROMPT, "--max-new-tokens", 16).stdout
    assert run(folder, PROMPT, "--temperature", 1, "--top-p", 1e-6, "--max-new-tokens", 16).stdout == greedy != texts[0]


def test_new_tokens_end_at_the_position_limit(folder):
    result = run(folder, "x" * 505, "--max-new-tokens", 50)
    assert result.exit_code == 0 and "cache of 512 tokens" in result.stderr


# ---- conversations -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_tokens(monkeypatch):
    """How many tokens each forward pass reads."""
    counts, forward = [], RatPlusForCausalLM.forward

    @functools.wraps(forward)  # generate() looks at its signature
    def counting(self, input_ids=None, **kwargs):
        counts.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(RatPlusForCausalLM, "forward", counting)
    return counts


def test_turns_without_a_template_go_on_with_the_text_and_reuse_the_cache(folder, read_tokens):
    result = run(folder, "--chat", "--max-new-tokens", 6, stdin="First line\n\nAnd another\n")
    assert result.exit_code == 0, result.output
    prefills = [count for count in read_tokens if count > 1]
    assert prefills == [len("First line\n"), 1 + len("\nAnd another\n")]  # the last token written had not been read
    loaded = load_model(folder)
    one = Generator(loaded, Settings(max_new_tokens=6))
    first = one.go_on(loaded.encode("First line\n"))
    again = Generator(loaded, Settings(max_new_tokens=6))  # without what the first turn left in the cache
    second = again.go_on([*one.written, *loaded.encode("\nAnd another\n")])
    assert result.stdout == f"{first}\n{second}\n"


def test_turns_with_a_template_are_messages(tmp_path, read_tokens):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert run(folder, "Hello", "--chat", "--max-new-tokens", 4, stdin="More\n").exit_code == 0
    prefills = [count for count in read_tokens if count > 1]
    first, second = "[user] Hello\n[assistant] ", "\n[user] More\n[assistant] "
    assert prefills == [len(first), 1 + len(second)]


def test_a_conversation_that_fills_the_positions_ends_in_one_sentence(folder):
    assert "takes 512 with the answer" in sentence(folder, "--chat", "--max-new-tokens", 200, stdin="a\n" * 4)


def test_ctrl_c_ends_cleanly(folder, monkeypatch):
    class Interrupting(generator._TimedStreamer):
        def put(self, value):
            super().put(value)
            if len(self._times) == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(generator, "_TimedStreamer", Interrupting)
    result = run(folder, PROMPT)
    assert result.exit_code == 130
    assert result.stdout.endswith("\n") and "decode: 3 tokens" in result.stderr and "Traceback" not in result.output


# ---- bad input -----------------------------------------------------------------------------------------------------------------------


def sentence(*arguments, stdin=None):
    """What the command says of bad input; it must not have written any text."""
    result = run(*arguments, stdin=stdin)
    with pytest.raises(SystemExit) as exit, exit_2_on_bad_input():
        raise result.exception
    assert exit.value.code == 2
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["x" * 512], None, "the prompt has 512 tokens"),
        ([""], None, "the prompt is empty"),
        (["-"], " \n", "the prompt is empty"),
        ([PROMPT, "--pattern", "q7"], None, "unknown attention pattern 'q7'"),
        ([PROMPT, "--pattern", "[d4]*3"], None, "lists 3 layers, but the model has 2"),
        ([PROMPT, "--temperature", -1], None, "--temperature -1.0 is negative"),
        ([PROMPT, "--top-p", 0], None, "--top-p 0.0 is not above 0"),
        ([PROMPT, "--max-new-tokens", 0], None, "--max-new-tokens 0"),
        ([PROMPT, "--dtype", "int8"], None, "--dtype int8 is not one of"),
        ([PROMPT, "--device", "abacus"], None, "--device abacus cannot be used"),
    ],
)
def test_bad_arguments(folder, arguments, stdin, says):
    assert says in sentence(folder, *arguments, stdin=stdin)


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _drop_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "model.safetensors is truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (_drop_a_weight, "has no model.layers.1.mlp.up_proj.weight, which its config.json asks for"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (_change_config(model_type="llama"), "has model_type 'llama' in config.json"),
        (_change_config(attention_pattern="d4d"), "unknown attention pattern 'd4d'"),
        (_change_config(hidden_size=64), "but its config.json says (257, 64)"),
        (_change_config(tokenizer_hash="0" * 16), "is not the one that the model was trained with"),
        (_drop_tokenizer, "holds no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_bad_folders(tmp_path, damage, says):
    folder = save_tiny_model(tmp_path / "model")
    damage(folder)
    assert says in sentence(folder, PROMPT)


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    assert "ids up to 256, the model a vocabulary of 200" in sentence(save_tiny_model(tmp_path / "model", vocab_size=200), PROMPT)


def test_no_such_folder(tmp_path):
    assert "is not a folder" in sentence(tmp_path / "nowhere", PROMPT)


def test_the_right_tokenizer_hash_is_accepted(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    _change_config(tokenizer_hash=tokenizer_hash(AutoTokenizer.from_pretrained(folder)))(folder)
    assert load_model(folder).tokenizer is not None
