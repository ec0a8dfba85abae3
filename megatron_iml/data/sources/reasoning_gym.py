"""Tasks made offline by the `reasoning-gym` package: real questions with checked answers, without a download.

What enters: a seed and a number of examples. What leaves: the 52 tasks of `GYM_TASKS` in 11 categories,
with the package's question as source and its answer as target.

    syllogism, item 0
    ->  source "Consider these statements: ... (Answer Yes or No)", targets ("No",), candidates ("Yes", "No")

Of the package's 105 generators those were taken whose items are short (questions below 1,400 characters,
answers below 200), quick to make (below 5 ms) and equal in every process: isomorphic_strings,
list_functions, ransom_note, word_ladder, polynomial_multiplication and codeio change with Python's hash
seed.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from megatron_iml.data.example import Example, Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts

BENCHMARK = "ReasoningGym"

# Every answer that the generators of the task give: the writer drops a row whose answer is none of them.
TRUE_FALSE = ("True", "False")
YES_NO = ("Yes", "No")
LIGHT = ("on", "off", "undetermined")
COUNT_UP_TO_7 = ("0", "1", "2", "3", "4", "5", "6", "7")
RELATIONS = (
    "brother",
    "daughter",
    "father",
    "father-in-law",
    "grandfather",
    "grandmother",
    "husband",
    "mother",
    "mother-in-law",
    "sister",
    "son",
    "wife",
)
COLOURS = (
    "blue",
    "brown",
    "cyan",
    "gold",
    "gray",
    "green",
    "indigo",
    "magenta",
    "orange",
    "pink",
    "purple",
    "red",
    "silver",
    "violet",
    "white",
    "yellow",
)


class GymTask(NamedTuple):
    """One generator of the package; `candidates` where the answers come from a small closed set."""

    category: str
    name: str
    metric: Metric = "exact_match"
    candidates: tuple[str, ...] = ()


GYM_TASKS = (
    GymTask("algebra", "complex_arithmetic"),
    GymTask("algebra", "simple_equations"),
    GymTask("algorithmic", "ab", "rouge_l"),
    GymTask("algorithmic", "base_conversion"),
    GymTask("algorithmic", "binary_alternation"),
    GymTask("algorithmic", "caesar_cipher", "rouge_l"),
    GymTask("algorithmic", "count_primes"),
    GymTask("algorithmic", "game_of_life_halting", "accuracy", TRUE_FALSE),
    GymTask("algorithmic", "letter_counting"),
    GymTask("algorithmic", "letter_jumble", "rouge_l"),
    GymTask("algorithmic", "number_filtering", "rouge_l"),
    GymTask("algorithmic", "number_sorting", "rouge_l"),
    GymTask("algorithmic", "palindrome_generation"),
    GymTask("algorithmic", "rotate_matrix", "rouge_l"),
    GymTask("algorithmic", "sentence_reordering", "rouge_l"),
    GymTask("algorithmic", "spell_backward"),
    GymTask("algorithmic", "word_sequence_reversal", "rouge_l"),
    GymTask("algorithmic", "word_sorting", "rouge_l"),
    GymTask("arc", "arc_1d", "rouge_l"),
    GymTask("arithmetic", "basic_arithmetic"),
    GymTask("arithmetic", "bitwise_arithmetic"),
    GymTask("arithmetic", "calendar_arithmetic"),
    GymTask("arithmetic", "chain_sum"),
    GymTask("arithmetic", "count_bits"),
    GymTask("arithmetic", "decimal_chain_sum"),
    GymTask("arithmetic", "dice"),
    GymTask("arithmetic", "fraction_simplification"),
    GymTask("arithmetic", "gcd"),
    GymTask("arithmetic", "gsm_symbolic"),
    GymTask("arithmetic", "lcm"),
    GymTask("arithmetic", "leg_counting"),
    GymTask("arithmetic", "number_format"),
    GymTask("arithmetic", "prime_factorization"),
    GymTask("arithmetic", "products"),
    GymTask("arithmetic", "time_intervals"),
    GymTask("cognition", "color_cube_rotation", "accuracy", COLOURS),
    GymTask("cognition", "number_sequence"),
    GymTask("games", "kakurasu", "rouge_l"),
    GymTask("games", "maze"),
    GymTask("games", "mini_sudoku", "rouge_l"),
    GymTask("games", "tsumego"),
    GymTask("geometry", "simple_geometry"),
    GymTask("graphs", "course_schedule", "accuracy", TRUE_FALSE),
    GymTask("graphs", "family_relationships", "accuracy", RELATIONS),
    GymTask("graphs", "largest_island"),
    GymTask("graphs", "shortest_path", "rouge_l"),
    GymTask("induction", "acre", "accuracy", LIGHT),
    GymTask("logic", "aiw"),
    GymTask("logic", "knights_knaves", "rouge_l"),
    GymTask("logic", "self_reference", "accuracy", COUNT_UP_TO_7),
    GymTask("logic", "syllogism", "accuracy", YES_NO),
    GymTask("probability", "coin_flip"),
)


def read(folder: None, drops: Drops, *, examples_per_task: int = 400, seed: int = 1) -> Iterator[Task]:
    """All tasks of `GYM_TASKS`.

    Args:
        folder: None, for nothing is read.
        drops: where instances are counted.
        examples_per_task: items asked of each generator; repeated questions are dropped.
        seed: 0 to 2,047; other seeds give other items.

    Raises:
        ValueError: the package is missing, or an option is out of range.
    """
    if examples_per_task < 1 or not 0 <= seed < 2048:
        raise ValueError(
            f"reasoning_gym: got examples_per_task {examples_per_task} and seed {seed}; "
            "give 1 or more examples and a seed from 0 to 2047"
        )
    # Fails here, where sources are listed, rather than at the first example.
    _create_dataset()
    for task in GYM_TASKS:
        counts = drops.task(BENCHMARK, task.name)
        examples = partial(_examples, task, counts, examples_per_task, seed)
        yield Task(task.name, BENCHMARK, task.category, task.metric, examples)


def _examples(task: GymTask, counts: TaskCounts, examples_per_task: int, seed: int) -> Iterator[Example]:
    # The package seeds item i with seed + i: seeds must lie further apart than any number of examples.
    items: Sequence[dict[str, Any]] = _create_dataset()(task.name, seed=seed << 20, size=examples_per_task)
    seen: set[str] = set()
    for index in range(examples_per_task):
        question, answer = items[index]["question"], str(items[index]["answer"])
        counts.read += 1
        # Small generators repeat themselves: a repeated question might be trained on and evaluated.
        if question in seen:
            counts.drop("repeated question")
            continue
        seen.add(question)
        yield Example(
            id=f"{task.name}-{index}",
            task=task.name,
            benchmark=BENCHMARK,
            category=task.category,
            source=question.rstrip(),
            targets=(answer,),
            # The closed set of the generator and not the item's options: every item ranks the same.
            candidates=task.candidates,
        )


def _create_dataset() -> Any:
    """The package's factory. Imported only where it is used: it takes seconds and is an extra."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ValueError(
            "the source reasoning_gym needs its package; run: pip install 'megatron-iml[demo]'"
        ) from error
    return create_dataset
