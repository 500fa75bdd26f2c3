"""Needle tests of any length that need no download, in the manner of RULER's NIAH tasks (arXiv 2404.06654): numbers are hidden in a long
text, and the model is asked for some of them; its greedy answer is scored by the share of the right numbers in it. Words, sentences and
the draw are our own and follow from the seed alone.

python -m rat_megatron.evaluation.needles train.jsonl --tokenizer MODEL --length 4096 --count 18000 --seed 1

writes lines {"prompt": ..., "answer": ...} to fine-tune on; the answer begins with the space that separates the two.
"""

from __future__ import annotations

import bisect
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rat_megatron.errors import UserError, exit_2_on_bad_input
from rat_megatron.files import atomic_file

if TYPE_CHECKING:
    from rat_megatron.evaluation.model import LoadedModel

DEPTHS = 10  # bins of depth: 0 is the first tenth of the text
ANSWER_TOKENS = 128  # a model may write so many; they count in the length, as RULER counts


@dataclass(frozen=True)
class Kind:
    """How many names are hidden, how many of them are asked for, and how many numbers each has. In a hay of needles every sentence
    hides a number that is not asked for; in any other it is filler."""

    keys: int = 1
    queries: int = 1
    values: int = 1
    hay_of_needles: bool = False


KINDS = {
    "single": Kind(),
    "multikey": Kind(keys=4),
    "multikey-hay": Kind(hay_of_needles=True),
    "multiquery": Kind(keys=4, queries=4),
    "multivalue": Kind(values=4),
}


@dataclass(frozen=True)
class Needle:
    """One question: the prompt, the numbers that a right answer names, in the order of the question, and where each lies in the text,
    from 0 to 1."""

    prompt: str
    expected: tuple[str, ...]
    depths: tuple[float, ...]

    @property
    def answer(self) -> str:
        """What continues the prompt."""
        return f" {_join(self.expected)}."

    def score(self, text: str) -> list[bool]:
        """For each expected number, whether it is in what the model wrote."""
        return [value in text for value in self.expected]


class NeedleWriter:
    """Writes questions of one tokenizer, kind and length; ``length`` counts the tokens of the prompt and ``room`` more.

    A prompt is never longer, and shorter by less than a short sentence. ``room`` None makes room for each question's own answer.
    Raises UserError when the length does not even hold the question.
    """

    def __init__(self, tokenizer: Any, length: int, kind: str, *, room: int | None = None):
        if kind not in KINDS:
            raise UserError(f"unknown kind of needle test '{kind}': choose from {', '.join(KINDS)}.")
        self.tokenizer, self.length, self.name, self.kind, self.room = tokenizer, length, kind, KINDS[kind], room

    def write(self, count: int, seed: int) -> Iterator[Needle]:
        """``count`` questions. The first n of them are the same for any count."""
        for index in range(count):
            yield self.one(index, seed)

    def one(self, index: int, seed: int) -> Needle:
        """Question number ``index``. Over successive indices the needles that are asked for visit every depth alike."""
        rng = random.Random(f"{seed} {self.name} {self.length} {index}")
        kind = self.kind
        names, numbers = _distinct(rng, _name), _distinct(rng, _number)
        hidden = [(name, next(numbers)) for name in (next(names) for _ in range(kind.keys)) for _ in range(kind.values)]
        asked = kind.queries * kind.values
        depths = [((index * asked + i) % DEPTHS + rng.random()) / DEPTHS for i in range(asked)]
        depths += [rng.random() for _ in hidden[asked:]]

        def prompt(hay: list[str]) -> str:
            places = sorted(zip((round(depth * len(hay)) for depth in depths), range(len(hidden)), strict=True), reverse=True)
            text = list(hay)
            for place, i in places:
                text.insert(place, _sentence(*hidden[i]))
            return _PROMPT.format(text=" ".join(text), names=_join(list(dict.fromkeys(name for name, _ in hidden[:asked]))))

        expected = tuple(number for _, number in hidden[:asked])
        room = self._tokens(f" {_join(expected)}.") if self.room is None else self.room
        hay = self._fill(prompt, self.length - room, rng, names, numbers)
        return Needle(prompt(hay), expected, tuple(depths[:asked]))

    def _fill(self, prompt, budget: int, rng: random.Random, names: Iterator[str], numbers: Iterator[str]) -> list[str]:
        """As much hay as leaves the prompt within ``budget`` tokens. A sentence by itself may have a few tokens more or fewer than in its
        place, so that the whole is counted after every addition, and the rest is filled up or what is too much is taken away."""
        total = self._tokens(prompt([]))
        if total > budget:
            needed = (total + self.length - budget) * 11 // 10  # some questions have longer names than this one
            raise UserError(f"{self.length} tokens are too few for a '{self.name}' needle test with this tokenizer: give {needed} or more.")
        hay: list[tuple[str, int]] = []
        while added := list(self._sentences(budget - total, rng, names, numbers)):
            hay += added
            total = self._tokens(prompt([sentence for sentence, _ in hay]))
            excess = total > budget
            while total > budget:
                while total > budget:
                    total -= hay.pop()[1]
                total = self._tokens(prompt([sentence for sentence, _ in hay]))
            if excess:
                break
        return [sentence for sentence, _ in hay]

    def _sentences(self, budget: int, rng: random.Random, names: Iterator[str], numbers: Iterator[str]) -> Iterator[tuple[str, int]]:
        """Sentences of hay with their tokens, ``budget`` of them at most."""
        while True:
            if self.kind.hay_of_needles:
                sentence = _sentence(next(names), next(numbers))
                cost = self._tokens(f" {sentence}")
            else:
                index = rng.randrange(max(1, bisect.bisect_right(self._costs, budget)))
                sentence, cost = self._filler[index], self._costs[index]
            if cost > budget:
                return
            yield sentence, cost
            budget -= cost

    @cached_property
    def _filler(self) -> list[str]:
        """Filler sentences, the one of fewest tokens first."""
        return sorted(_FILLER, key=lambda sentence: self._tokens(f" {sentence}"))

    @cached_property
    def _costs(self) -> list[int]:
        return [self._tokens(f" {sentence}") for sentence in self._filler]

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class NeedleTask:
    """``count`` questions of each kind at one length, written once, so that every pattern gets the same ones.

    Raises UserError where the length does not fit the model or holds no question.
    """

    def __init__(self, loaded: LoadedModel, length: int, *, count: int, seed: int):
        limit = loaded.config.max_position_embeddings
        if length > limit:
            raise UserError(f"--needle-length {length} is past the {limit} positions of {loaded.folder}: give {limit} or less.")
        tokenizer = loaded.need_tokenizer()
        self.length = length
        self.questions: dict[str, list[Needle]] = {
            kind: list(NeedleWriter(tokenizer, length, kind, room=ANSWER_TOKENS).write(count, seed)) for kind in KINDS
        }

    def run(self, loaded: LoadedModel, *, batch_size: int) -> dict[str, dict[str, Any]]:
        """For each kind its score, standard error (from 2 questions on), number of questions and score by depth, under the model's
        current attention pattern. ``by_depth`` has the score of the needles in each tenth of the text, None where there were none."""
        return {kind: _summary(questions, _found(loaded, questions, batch_size)) for kind, questions in self.questions.items()}


def write_jsonl(
    output: Path,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int,
    kinds: list[str],
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes ``count`` lines {"prompt", "answer"}, the kinds in turn, each of at most ``length`` tokens, prompt and answer tokenized apart.

    The file appears whole or not at all. ``progress`` is called with the number of lines done.
    """
    writers = [NeedleWriter(tokenizer, length, kind) for kind in kinds]
    try:
        with atomic_file(output) as file:
            for index in range(count):
                needle = writers[index % len(writers)].one(index // len(writers), seed)
                file.write(json.dumps({"prompt": needle.prompt, "answer": needle.answer}) + "\n")
                progress(index + 1)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error


def _found(loaded: LoadedModel, questions: list[Needle], batch_size: int) -> list[list[bool]]:
    return [
        needle.score(text)
        for some in batched(questions, batch_size)
        for needle, text in zip(some, loaded.continue_greedily([needle.prompt for needle in some], ANSWER_TOKENS), strict=True)
    ]


def _summary(questions: list[Needle], found: list[list[bool]]) -> dict[str, Any]:
    scores = [sum(row) / len(row) for row in found]
    bins = defaultdict(list)
    for needle, row in zip(questions, found, strict=True):
        for depth, hit in zip(needle.depths, row, strict=True):
            bins[int(depth * DEPTHS)].append(hit)
    summary: dict[str, Any] = {"score": statistics.fmean(scores), "questions": len(scores)}
    if len(scores) > 1:
        summary["stderr"] = statistics.stdev(scores) / len(scores) ** 0.5
    summary["by_depth"] = [sum(bins[i]) / len(bins[i]) if bins[i] else None for i in range(DEPTHS)]
    return summary


# ---- words ---------------------------------------------------------------------------------------------------------------------------

_PROMPT = (
    "Somewhere in this text stand numbers that belong to names. Read it, then answer the question after it.\n\n"
    "{text}\n\n"
    "Question: What does the text say is the number of {names}? Give every number.\nAnswer: According to the text, it is"
)
_FIRST = (
    "amber ancient blue bold brass bright broad calm clever copper coral crimson damp distant dusty eager early fair famous fast "
    "frozen gentle gold grand green happy heavy hidden hollow honest humble iron ivory jolly keen large late little lively lonely lucky "
    "marble mild misty modest narrow noble oaken old pale plain polished proud purple quick quiet rapid rare red rough round royal rusty "
    "sandy scarlet sharp shy silent silver slow small smooth soft stone strong sunny tall thin tiny tired velvet warm white wild wise"
).split()
_SECOND = (
    "acorn anchor apple badger barrel basket beacon bell bridge bucket cabin candle canyon castle cedar chapel cherry cliff clock "
    "cloud compass cottage crane creek crown desert eagle falcon farm feather ferry fiddle forest fox garden gate glacier goose hammer "
    "harbor hawk hill island kettle kite ladder lake lantern lemon lion maple market meadow mill mirror mountain oak orchard otter owl "
    "paddle palace parrot pearl pepper piano pigeon planet pond rabbit raven ribbon river robin rocket saddle sail salmon sparrow spoon "
    "stable statue temple tiger tower train trumpet tulip tunnel turtle valley violin wagon walnut whale willow window wolf"
).split()
_FILLER = (
    "Rain fell.",
    "Nobody spoke.",
    "The shop was closed.",
    "A dog slept by the door.",
    "The bus came a little late.",
    "Leaves had gathered along the wall.",
    "Someone had left a bicycle in the yard.",
    "The baker put fresh bread on the shelf.",
    "Two children were throwing stones into the water.",
    "Over the roofs the first swallows had come back.",
    "My neighbour paints his fence every spring in another colour.",
    "The library opens at nine, but the reading room stays shut until noon.",
    "On the table lay a map of a coast that none of us had ever seen.",
    "We took the long way home because the road along the canal was under repair.",
    "The teacher asked for silence, and for a moment only the heating could be heard.",
    "In the evening the fishermen mend their nets and talk about the weather of other years.",
    "The soup needs an hour on a low flame, and it tastes better on the day after.",
    "An old radio in the kitchen was playing a waltz that my grandmother used to hum.",
    "After the storm the path through the woods was covered with twigs and wet bark.",
    "The museum keeps its oldest coins in a drawer that visitors may open themselves.",
    "Since the factory closed, the trains that stop here have been short and mostly empty.",
    "He folded the letter twice, put it back into its envelope, and went to make some tea.",
    "The committee met on Thursday and decided, as it often did, to meet once more.",
    "From the top of the tower one can see the plain, the two lakes, and on clear days the sea.",
)


def _sentence(name: str, number: str) -> str:
    return f"The number of {name} is {number}."


def _name(rng: random.Random) -> str:
    return f"the {' '.join(rng.sample(_FIRST, 2))} {rng.choice(_SECOND)}"  # some 800,000: enough for a hay of needles


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _distinct(rng: random.Random, draw) -> Iterator[str]:
    seen = set()
    while True:
        value = draw(rng)
        if value not in seen:
            seen.add(value)
            yield value


def _join(words: list[str] | tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def _main(
    output: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face name, or a folder with a tokenizer.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together, at most.")],
    count: Annotated[int, typer.Option(min=1, help="Lines to write.")],
    seed: Annotated[int, typer.Option(help="Evaluation draws with seed 0: take another to train on.")] = 1,
    kind: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(KINDS)}; repeat for more, in turn. Default: all.")] = None,
) -> None:
    """Write needle tests as lines {"prompt", "answer"} for fine-tuning."""
    from rich.progress import Progress

    from rat_megatron.data.prepare.settings import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    options: dict[str, Any] = {"length": length, "count": count, "seed": seed, "kinds": kind or list(KINDS)}
    with Progress(transient=True) as bar:
        task = bar.add_task("needles", total=count)
        write_jsonl(output, loaded, **options, progress=lambda done: bar.update(task, completed=done))


if __name__ == "__main__":
    with exit_2_on_bad_input():
        typer.run(_main)
