"""The table of the architecture: every flag of Megatron's parser is decided in it, and training, layers and converter keep to it."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rat_megatron.errors import UserError
from rat_megatron.model.architecture import EXPORTED, FIXED, UNUSED, other_values
from tests.helpers import MODEL_FLAGS

pytestmark = pytest.mark.usefixtures("megatron_process")

# Flags that leave the model as it is, or change how it is trained in a way that its weights hold: parallelism, optimizer, logging, ...
NEUTRAL = set(Path(__file__).with_name("megatron_flags.txt").read_text().split())


@pytest.fixture
def parser(monkeypatch):
    from rat_megatron.training.arguments import flags_of_this_program

    monkeypatch.setattr(sys, "argv", ["pretrain_rat.py"])
    return flags_of_this_program()


@pytest.fixture
def read(monkeypatch):
    from rat_megatron.training.arguments import read_command_line

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *map(str, flags)])
        return read_command_line()

    return run


def groups_of(parser):
    return {a.dest: g.title for g in parser._action_groups for a in g._group_actions if a.dest != "help" and g.title != "rat"}


def unused(group, name):
    return any(rule.holds(group, name) for rule in UNUSED)


def typed_otherwise(parser, name):
    """The words on the command line that give an argument another value than its default; None where no words do."""
    default = vars(parser.parse_args([]))[name]
    for action in (action for action in parser._actions if action.dest == name):
        values = (
            [str(choice) for choice in action.choices] if action.choices else ["3", "7", "0.25", "yes", "NullTokenizer", "[1,2]", "a-b"]
        )
        for words in [[o] for o in action.option_strings] + [[o, value] for o in action.option_strings for value in values]:
            try:
                read = parser.parse_args(words)
            except (UserError, ValueError, KeyError):  # KeyError: of an enumeration
                continue
            if vars(read)[name] != default:
                return words
    return None


def test_every_flag_of_megatron_is_decided(parser):
    undecided, twice = [], []
    for name, group in groups_of(parser).items():
        places = (name in EXPORTED) + (name in FIXED) + (name in NEUTRAL)
        if places == 0 and not unused(group, name):
            undecided.append(name)
        if places > 1:
            twice.append(name)
    assert not undecided, "new in Megatron: decide in rat_megatron/model/architecture.py, or in tests/unit/megatron_flags.txt"
    assert not twice


def test_the_table_names_what_megatron_has(parser):
    groups = groups_of(parser)
    named = {*EXPORTED, *FIXED, *NEUTRAL, *(name for rule in UNUSED for name in (*rule.names, *rule.but))}
    assert {name for name in named if not name.startswith("rat_")} <= set(groups)
    for rule in UNUSED:
        assert set(rule.groups) <= set(groups.values())
        assert all(any(name.startswith(prefix) for name in groups) for prefix in rule.prefixes)


def test_no_flag_gives_another_model_or_nothing_at_all(parser, monkeypatch):
    from rat_megatron.training.arguments.architecture import check_architecture

    groups, untyped = groups_of(parser), []
    for name in groups:
        if name not in FIXED and not unused(groups[name], name):
            continue
        flags = typed_otherwise(parser, name)
        if flags is None:
            untyped.append(name)
        elif flags[0] != "--yaml-cfg":
            with pytest.raises(UserError, match=f"^{flags[0]} "):
                monkeypatch.setattr(sys, "argv", ["pretrain_rat.py", *flags])
                check_architecture(parser.parse_args(flags), parser)
    # Their flags give the value that holds here already.
    assert set(untyped) <= {"add_bias_linear", "bias_gelu_fusion"}


@pytest.mark.parametrize(
    "flags, sentence",
    {
        "other layers": (["--spec", "some.module", "spec"], "--spec some.module spec gives other layers than RAT\\+"),
        "inference": (["--transformer-impl", "inference_optimized"], "inference_optimized cannot train"),
        "yaml": (["--yaml-cfg", "a.yaml"], "--yaml-cfg is not supported"),
        "with a value": (["--normalization", "LayerNorm"], "--normalization LayerNorm is not part .* leave it out, or give RMSNorm"),
        "frozen": (["--freeze-all-layers"], "--freeze-all-layers would change nothing here: leave it out"),
        "residual": (["--bf16", "--fp32-residual-connection"], "--fp32-residual-connection is not supported: Megatron's layers"),
        "xavier": (["--init-method-xavier-uniform"], "lacks what it sets; give --init-method-std"),
        "batch": (["--batch-invariant-mode", "--attention-backend", "flash"], "RAT\\+'s own kernels do not keep to it"),
        "faults": (["--fault-injector-ranks", "0"], "is for tests with nvidia_resiliency_ext, which .*: leave it out"),
        "two scalings": (
            ["--use-rope-scaling", "--rotary-seq-len-interpolation-factor", "2"],
            "cannot scale RoPE beside --use-rope-scaling",
        ),
        "yarn and llama3": (["--position-embedding-type", "yarn", "--use-rope-scaling"], "beside --position-embedding-type yarn"),
        "yarn's": (["--rotary-scaling-factor", "4"], "--rotary-scaling-factor would change nothing without --position-embedding-type yarn"),
        "shorter": (["--position-embedding-type", "yarn", "--rotary-scaling-factor", "0.5"], "0.5 would shorten the range of RoPE"),
        "over heads": (["--rat-qk-layernorm-over-heads"], "says how --qk-layernorm is computed: give that too"),
        "gates of a baseline": (["--rat-gate-bias", "--no-rat-recurrence"], "--rat-gate-bias is for the layer with a recurrence"),
        "no angles": (["--position-embedding-type", "none"], "--position-embedding-type none is not part .* or give rope"),
        "documents": (["--dataloader-inter-document-masking"], "tokens of one document would see those of another"),
    }.values(),
)
def test_refusals_that_have_a_sentence_of_their_own(read, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        read(*MODEL_FLAGS, *flags)


def test_the_right_values_may_be_typed(read):
    flags = "--normalization RMSNorm --position-embedding-type rope --rotary-percent 1.0 --softmax-type vanilla --disable-bias-linear"
    assert list(other_values(read(*MODEL_FLAGS, *flags.split(), "--attention-output-gate", "--attention-dropout", 0))) == []


@pytest.mark.parametrize("name", FIXED)
def test_the_converter_refuses_a_checkpoint_of_another_model(name, tmp_path):
    from rat_megatron.convert.megatron_args import config_from_args
    from tests.converting import megatron_args

    assert config_from_args(megatron_args(**{name: FIXED[name]}), tmp_path, None)
    with pytest.raises(UserError, match=f"was trained with {name}=other: a RAT\\+ model has {name}="):
        config_from_args(megatron_args(**{name: "other"}), tmp_path, None)


def test_the_converter_refuses_other_layers(tmp_path):
    from rat_megatron.convert.megatron_args import config_from_args
    from tests.converting import megatron_args

    with pytest.raises(UserError, match="the layers of --spec some.module spec"):
        config_from_args(megatron_args(spec=["some.module", "spec"]), tmp_path, None)


@pytest.mark.parametrize("name, value", [("softmax_type", "off-by-one"), ("qk_l2_norm", True), ("attention_dropout", 0.1)])
def test_layers_refuse_a_config_that_they_would_ignore(name, value):
    from rat_megatron.model.layer_spec import get_rat_layer_spec

    config = Namespace(transformer_impl="local", rat_recurrence=True)
    assert get_rat_layer_spec(config)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{name} is {value!r}, and a RAT\\+ layer has"):
        get_rat_layer_spec(config)


HARMLESS = ("--disable-bias-linear", "--no-bias-gelu-fusion")  # they give the value of a RAT+ model


def test_the_readme_says_which_flags_are_refused(parser):
    flags = {action.dest: action.option_strings[-1] for action in parser._actions}
    fixed = ", ".join(f"`{flags[name]}`" for name in FIXED if flags[name] not in HARMLESS)
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"only the value that a RAT+ model has: {fixed}." in readme
    groups = ", ".join(group for rule in UNUSED for group in rule.groups)
    assert f"The whole of its groups {groups}," in readme
