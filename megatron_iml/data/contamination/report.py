"""What was found, for a person: a report with examples to look at, and a file of decisions to change.

What enters: the findings of `search.py`. What leaves: report.md, and decisions.yaml, which holds

    - {training: A__D__trivia, evaluation: test/B__C__quiz.jsonl, rows: 100, shared: 7, specific: 4,
       decision: remove_training_examples}

for each pair that shares more than the threshold. As proposed, training examples go where more than the
threshold is shared beyond templates, and everything else stays; removal.py does what the file says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from megatron_iml.data.bench.folder import BenchFile
from megatron_iml.data.contamination.ngrams import NgramHasher
from megatron_iml.data.contamination.search import Findings, Pair, row_texts

DECISIONS = (
    "keep",
    "remove_training_examples",
    "remove_evaluation_examples",
    "remove_training_task",
    "remove_evaluation_task",
)
REPORT = "report.md"
DECISION_FILE = "decisions.yaml"
EXAMPLES_PER_PAIR = 3
# Pairs that the report shows with examples; the decision file has all of them.
PAIRS_WITH_EXAMPLES = 200
LONGEST_QUOTE_WORDS = 60


@dataclass(frozen=True, slots=True)
class SharedText:
    """Words that a training row and an evaluation row have in common."""

    training_id: str
    evaluation_id: str
    words: str


def pairs_over(findings: Findings, threshold: float) -> list[Pair]:
    """Pairs of which more than `threshold` of the evaluation rows share an n-gram, the gravest first."""
    over = [pair for pair in findings.pairs() if pair.shared > threshold * pair.evaluation.examples]
    return sorted(
        over,
        key=lambda pair: (pair.specific / pair.evaluation.examples, pair.shared / pair.evaluation.examples),
        reverse=True,
    )


def proposed(pair: Pair, threshold: float) -> str:
    """The decision that a pair gets until a person has looked at it."""
    specific = pair.specific > threshold * pair.evaluation.examples
    return "remove_training_examples" if specific else "keep"


def write_report(findings: Findings, threshold: float) -> list[Pair]:
    """Write both files and return the pairs; a decision file that is there already is not touched."""
    pairs = pairs_over(findings, threshold)
    rows = sum(entry.examples for entry in findings.evaluation)
    too_short = sum(findings.rows_too_short.values())
    lines = [
        "# Shared words of training and evaluation",
        "",
        f"{len(pairs)} pairs of a training task and an evaluation file of which more than {threshold:.1%} of "
        f"the rows share a run of {findings.ngram} words. `specific` leaves out runs that reach into words "
        "that so many rows of a task hold that they must be its instruction. "
        f"{too_short:,} of {rows:,} evaluation rows have fewer words and cannot be compared.",
        "",
        "| training | evaluation | rows | shared | specific | proposed |",
        "|---|---|---|---|---|---|",
        *(_table_row(pair, threshold) for pair in pairs),
        "",
    ]
    hasher = NgramHasher(findings.ngram)
    for pair in pairs[:PAIRS_WITH_EXAMPLES]:
        lines.append(f"## {pair.training.stem} and {pair.evaluation.file}\n")
        for shared in examples_of(findings, pair, hasher):
            lines.append(f"- `{shared.training_id}` and `{shared.evaluation_id}`: {shared.words}")
        lines.append("")
    (findings.folder / REPORT).write_text("\n".join(lines), encoding="utf-8")
    decisions = findings.folder / DECISION_FILE
    # What a person wrote there is worth more than what a second run would propose.
    if not decisions.exists():
        decisions.write_text("\n".join(_decision_lines(findings, pairs, threshold)), encoding="utf-8")
    return pairs


def examples_of(findings: Findings, pair: Pair, hasher: NgramHasher) -> Iterator[SharedText]:
    """A few shared texts of a pair, of evaluation rows spread over those that share anything."""
    number = findings.evaluation.index(pair.evaluation)
    # Templates are shown only where nothing else is shared.
    hits = findings.specific_hits(pair.training) if pair.specific else findings.hits(pair.training)
    ngrams = hits["ngram"]
    first, stop = findings.first_rows[number], findings.first_rows[number + 1]
    rows = findings.index.rows_of(ngrams)
    rows = rows[(rows >= first) & (rows < stop)]
    # Spread over them: neighbours in a file are often alike.
    for row in rows[:: max(1, len(rows) // EXAMPLES_PER_PAIR)][:EXAMPLES_PER_PAIR].tolist():
        evaluation = _read_row(findings, pair.evaluation, int(findings.offsets_R[row]))
        for text in row_texts(evaluation):
            places, numbers = findings.index.find(hasher.hashes([text])[0])
            held = np.isin(numbers, ngrams)
            shared = dict(zip(places[held].tolist(), numbers[held].tolist(), strict=True))
            if shared:
                start = min(shared)
                # Hits are sorted by n-gram, so a search finds the one.
                offset = int(hits["offset"][ngrams.searchsorted(shared[start])])
                training = _read_row(findings, pair.training, offset)
                # N-gram number i begins with word i, so the run ends n - 1 words after its last one begins.
                words = hasher.words(text)[start : _end_of_run(shared, start) + hasher.n - 1]
                yield SharedText(training["id"], evaluation["id"], " ".join(words[:LONGEST_QUOTE_WORDS]))
                # One text of a row is enough.
                break


def _end_of_run(shared: dict[int, int], start: int) -> int:
    """One past the last n-gram of the unbroken run that begins at `start`."""
    while start in shared:
        start += 1
    return start


def _read_row(findings: Findings, entry: BenchFile, offset: int) -> dict:
    with findings.bench.path(entry).open("rb") as file:
        file.seek(offset)
        return dict(orjson.loads(file.readline()))


def _table_row(pair: Pair, threshold: float) -> str:
    rows = pair.evaluation.examples
    return (
        f"| {pair.training.stem} | {pair.evaluation.file} | {rows} | {pair.shared / rows:.1%} | "
        f"{pair.specific / rows:.1%} | {proposed(pair, threshold)} |"
    )


def _decision_lines(findings: Findings, pairs: Sequence[Pair], threshold: float) -> Iterator[str]:
    # Line by line: a YAML library writes no comments.
    yield "# What happens to tasks that share text; change any decision, then run remove_contamination.py."
    yield f"# decision: {', '.join(DECISIONS)}"
    yield f"bench_fingerprint: {findings.bench.fingerprint}"
    yield "pairs:" if pairs else "pairs: []"
    for pair in pairs:
        # JSON is YAML: names hold whatever benchmarks call their tasks.
        training, evaluation = (
            orjson.dumps(name).decode() for name in (pair.training.stem, pair.evaluation.file)
        )
        yield f"- training: {training}"
        yield f"  evaluation: {evaluation}"
        yield f"  rows: {pair.evaluation.examples}"
        yield f"  shared: {pair.shared}"
        yield f"  specific: {pair.specific}"
        yield f"  decision: {proposed(pair, threshold)}"
    yield ""
