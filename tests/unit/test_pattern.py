"""Pattern words: they print back, and masks, positions and counts follow the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_megatron.ratplus.pattern import GRAMMAR, AttentionPattern, HeadPattern, LayerPattern, PatternError
from tests.reference import sees

dilations = st.none() | st.integers(2, 70)
positional_heads = st.just(HeadPattern()) | st.builds(HeadPattern, dilations, st.integers(0, 80), st.integers(0, 9))
topk_heads = st.builds(
    HeadPattern,
    st.integers(2, 9),
    blocks=st.integers(1, 9),
    dilate_rest=st.booleans(),
    scores=st.sampled_from([None, "bounds", "means"]),
)
snap_heads = st.builds(
    lambda observed, more: HeadPattern(budget=observed + more, observed=observed), st.integers(1, 30), st.integers(1, 60)
)
heads = positional_heads | topk_heads | snap_heads
layers = st.builds(lambda several: LayerPattern(tuple(several)), st.lists(heads, min_size=1, max_size=6))
periods = st.builds(lambda period, times: tuple(period * times), st.lists(layers, min_size=1, max_size=4), st.integers(1, 4))
patterns = st.builds(lambda one: AttentionPattern((one,)), layers) | st.builds(
    lambda several: AttentionPattern(several, is_list=True), periods
)
lengths = st.integers(0, 100)


def positions_seen(head: HeadPattern, t: int) -> list[int]:
    return [j for j in range(t + 1) if sees(t, j, head.dilation, head.window, head.sinks)]


@given(patterns)
def test_a_pattern_prints_a_word_that_reads_back(pattern):
    word = str(pattern)
    assert AttentionPattern.parse(word) == pattern
    assert str(AttentionPattern.parse(word)) == word


@pytest.mark.parametrize(
    ("word", "shortest"),
    [
        ("d1", "dense"),
        ("d1w5", "dense"),
        ("d16w0s0", "d16"),
        ("d016", "d16"),
        ("s0", "w0"),
        ("w256s4", "w256s4"),
        ("d64k8+d", "d64k8+d"),
        ("d64k8means", "d64k8means"),
        ("d064k8bounds+d", "d64k8bounds+d"),
        ("snap1024w32", "snap1024w32"),
        ("[dense,snap064w08]", "[dense,snap64w8]"),
        ("[dense, d64, dense, d64]", "[dense,d64]*2"),
        ("[dense,dense,dense,d64]", "[dense*3,d64]"),
        ("[dense,d64]*12", "[dense,d64]*12"),
        ("[dense]", "[dense]"),
        ("{dense,dense,d64}", "{dense*2,d64}"),
        ("{d64}", "d64"),
        ("[{dense,d64},{dense,d64},d4]", "[{dense,d64}*2,d4]"),
    ],
)
def test_words_print_in_their_shortest_form(word, shortest):
    assert str(AttentionPattern.parse(word)) == shortest


@pytest.mark.parametrize(
    ("word", "shortest"),
    [
        ("[dense]*2", "dense"),
        (" [ d16w0s4 , d16s4 ] ", "d16s4"),
        ("{d4*4}", "d4"),
        ("[{d4*2,d4w0*2},d4]", "d4"),
        ("[{d4*4},d8]", "[d4,d8]"),
        ("{dense*2,d4*2}", "{dense*2,d4*2}"),
        ("[{dense*2,d4*2}]*2", "{dense*2,d4*2}"),
    ],
)
def test_what_is_all_alike_in_a_model_is_one_word(word, shortest):
    fitted = AttentionPattern.parse(word).fit(2, 4)
    assert str(fitted) == shortest and fitted == AttentionPattern.parse(shortest)
    for layer in range(2):
        heads = AttentionPattern.parse(word).layer(layer).heads
        assert fitted.layer(layer).heads * (4 // len(fitted.layer(layer).heads)) == heads * (4 // len(heads))
    with pytest.raises(PatternError, match="[35] (layers|heads)"):
        AttentionPattern.parse("[dense]*3" if word.startswith("[") else "{dense*5}").fit(2, 4)


@given(positional_heads, st.integers(1, 100))
def test_mask_is_the_definition(head, length):
    t = torch.arange(length)
    expected = [[sees(i, j, head.dilation, head.window, head.sinks) for j in range(length)] for i in range(length)]
    assert head.mask(t[:, None], t[None]).tolist() == expected


@given(positional_heads, lengths)
def test_kept_positions_are_what_the_next_query_sees(head, length):
    assert head.kept_positions(length).tolist() == [j for j in positions_seen(head, length) if j < length]


@given(positional_heads, lengths)
def test_pairs_are_counted(head, length):
    assert head.pairs(length) == sum(len(positions_seen(head, t)) for t in range(length))


@given(topk_heads, lengths)
def test_topk_pairs_are_counted(head, length):
    size = head.dilation
    expected = 0
    for t in range(length):
        own = t // size
        # Which blocks have the highest scores is unknown, but not how many keys: take the latest.
        blocks = {own, *([0] if head.blocks > 1 else []), *range(max(1, own - max(0, head.blocks - 2)), own)}
        expected += sum(j // size in blocks or (head.dilate_rest and (j + 1) % size == 0) for j in range(t + 1))
    assert head.pairs(length) == expected
    assert head.flops(length, 128) == 4 * 128 * expected


@given(positional_heads, st.integers(1, 100))
def test_cache_holds_all_that_any_step_needs(head, length):
    most = max(len(positions_seen(head, t)) for t in range(length))
    assert most <= head.cache_entries(length) <= length


@given(topk_heads, lengths)
def test_topk_keeps_every_key(head, length):
    assert head.cache_entries(length) == length
    assert head.kept_positions(length).tolist() == list(range(length))
    with pytest.raises(PatternError, match="no fixed mask"):
        head.mask(torch.zeros(1, 1), torch.zeros(1, 1))


@given(snap_heads, lengths)
def test_of_snapkv_a_prompt_is_counted(head, length):
    """Read densely; where something is dropped, its last queries score all keys up to their own once more."""
    scored = sum(t + 1 for t in range(length - head.observed, length)) if length > head.budget else 0
    assert head.pairs(length) == length * (length + 1) // 2
    assert head.flops(length, 16) == 4 * 16 * head.pairs(length) + 2 * 16 * scored
    assert head.cache_entries(length) == min(length, head.budget)
    assert not head.is_dense and head.of_prompt.is_dense
    with pytest.raises(PatternError, match="no fixed mask"):
        head.mask(torch.zeros(1, 1), torch.zeros(1, 1))


def test_what_cannot_be_trained_says_why():
    for word, reason in (
        ("snap64w8", "training sample has no prompt"),
        ("[d16,{snap64w8,dense}]", "'snap64w8' drops keys"),
        ("d64k8means+d", r"bounds: write 'd64k8\+d'"),
    ):
        with pytest.raises(PatternError, match=reason):
            AttentionPattern.parse(word).check_trainable()
    AttentionPattern.parse("[d64k8,d64k8bounds,w1019s4,{dense,d16}]").check_trainable()


def test_cache_capacity_is_sinks_window_itself_and_dilated():
    assert HeadPattern.parse("d16w256s4").cache_entries(4096) == 4 + 256 + 1 + 256
    assert HeadPattern.parse("d16").cache_entries(4090) == 1 + 256
    assert HeadPattern.parse("w256s4").cache_entries(4096) == 4 + 256 + 1
    assert HeadPattern.parse("dense").cache_entries(4096) == 4096


@given(layers.filter(lambda layer: layer.is_positional))
def test_layer_mask_stacks_its_heads(layer):
    t = torch.arange(20)
    mask = layer.mask(t[:, None], t[None])
    assert all(torch.equal(mask[h], head.mask(t[:, None], t[None])) for h, head in enumerate(layer.heads))


def test_totals_run_over_layers_and_heads():
    pattern = AttentionPattern.parse("[dense,{d4,w2}]")
    dense, dilated, local = (HeadPattern.parse(word) for word in ("dense", "d4", "w2"))
    expected = 2 * dense.flops(50, 8) + dilated.flops(50, 8) + local.flops(50, 8)
    assert pattern.flops(50, 8, num_layers=2, num_heads=2) == expected
    assert pattern.cache_entries(50, num_layers=2, num_heads=2) == 100 + dilated.cache_entries(50) + local.cache_entries(50)
    assert AttentionPattern.parse("d4").flops(50, 8, num_layers=3, num_heads=5) == 15 * dilated.flops(50, 8)


def test_layers_and_heads_of_a_rank():
    pattern = AttentionPattern.parse("[dense,{d4*2,w2*2}]")
    assert [str(pattern.layer(i)) for i in range(2)] == ["dense", "{d4*2,w2*2}"]
    assert str(pattern.layer(1).head_slice(1, 2)) == "{d4,w2}"
    assert str(pattern.layer(0).head_slice(1, 2)) == "dense"
    assert str(AttentionPattern.parse("d4").layer(17)) == "d4"


def test_what_a_pattern_is():
    assert AttentionPattern.parse("[dense,d1]").is_dense and not AttentionPattern.parse("[dense,d2]").is_dense
    assert AttentionPattern.parse("{d2,w3}").is_positional and not AttentionPattern.parse("{d2,d2k3}").is_positional
    assert LayerPattern((HeadPattern(2),) * 3).is_uniform and not AttentionPattern.parse("{d2,w3}").layer(0).is_uniform


@pytest.mark.parametrize(
    "word",
    [
        "",
        "sparse",
        "d",
        "16",
        "d-4",
        "d4d4",
        "w4d4",
        "d4+d",
        "dense4",
        "[",
        "[]",
        "[dense,]",
        "[dense",
        "{}",
        "{dense",
        "[[dense]]",
        "d9999999999",
        "snap64",
        "snapw8",
        "snap64w8s4",
        "d16snap64w8",
        "d64k8max",
        "d64means",
    ],
)
def test_bad_words_show_the_grammar(word):
    with pytest.raises(PatternError) as error:
        AttentionPattern.parse(word)
    assert GRAMMAR in str(error.value)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("d0", "dilation 0"),
        ("k8", "block size of at least 2"),
        ("d1k8", "block size of at least 2"),
        ("d64k0", "at least one block"),
        ("d64k8w4", "no window or sinks"),
        ("d64k8meansw4", "no window or sinks"),
        ("snap8w8", "first number must be larger"),
        ("snap8w0", "at least 1"),
        ("{dense,d64}*2", "repeats inside the braces"),
        ("[dense*0]", "from 1 to 4096"),
        ("[dense]*5000", "from 1 to 4096"),
        ("[dense*4000]*2", "8000 layers"),
        ("{dense*4000,d4*4000}", "8000 heads"),
    ],
)
def test_bad_words_say_what_is_wrong(word, reason):
    with pytest.raises(PatternError, match=reason):
        AttentionPattern.parse(word)


@given(st.text("dwsk+*[]{},0123456789nseap ", max_size=20))
def test_any_text_parses_or_raises_pattern_error(text):
    try:
        pattern = AttentionPattern.parse(text)
    except PatternError:
        return
    assert AttentionPattern.parse(str(pattern)) == pattern


def test_a_pattern_must_fit_the_model():
    AttentionPattern.parse("[dense,{d4*2,w2*2}]").check(num_layers=2, num_heads=4)
    AttentionPattern.parse("d4").check(num_layers=7, num_heads=3)
    with pytest.raises(PatternError, match="lists 2 layers, but the model has 3"):
        AttentionPattern.parse("[dense,d4]").check(num_layers=3, num_heads=4)
    with pytest.raises(PatternError, match="lists 4 heads, but a layer has 6"):
        AttentionPattern.parse("{d4*2,w2*2}").check(num_layers=2, num_heads=6)
