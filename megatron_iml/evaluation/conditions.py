"""Everything that decides the numbers of an evaluation; two with equal conditions give equal numbers.

What enters: the config and three fingerprints. What leaves: a frozen record that the report prints, that
comparison with a baseline checks, and whose digest names the results of a task for resumption.

    task_fingerprint(conditions, file_sha256="9f2c...", metric="rouge_l") -> "3f9a...", 64 hexadecimal digits
"""

import hashlib
from dataclasses import asdict, dataclass

import orjson

from megatron_iml.config.schema import Config
from megatron_iml.data.bench.splits import Split
from megatron_iml.evaluation.prompts import InferencePrefix
from megatron_iml.evaluation.ranking import Scoring

# Part of every fingerprint, so that old results are computed again rather than mixed with new ones.
RESULT_FORMAT_VERSION = 2
"""Raised whenever the same conditions begin to give other numbers or another file layout."""

# What is compared, and the prefix, which belongs to it. All else must be equal, fields to come included.
MAY_DIFFER_FROM_BASELINE = frozenset({"checkpoint", "checkpoint_fingerprint", "inference_prefix"})


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """One evaluation's inputs; lengths in tokens or positions."""

    checkpoint: str
    checkpoint_fingerprint: str
    bench_fingerprint: str
    tokenizer_fingerprint: str
    split: Split
    examples_per_task: int
    scoring: Scoring
    inference_prefix: InferencePrefix
    max_new_tokens: int
    max_positions: int
    precision: str
    """Type of weights and activations: bf16 and fp32 rank close candidates differently."""


def longest_document(config: Config) -> int:
    """Positions of the longest document that is evaluated: the position table limits it, and the row does."""
    return min(config.model.max_position_embeddings, config.data.row_length)


def conditions_from_config(
    config: Config, *, checkpoint: str, checkpoint_fingerprint: str, bench: str, tokenizer: str
) -> Conditions:
    """Conditions of a run; `bench` and `tokenizer` are fingerprints."""
    return Conditions(
        checkpoint=checkpoint,
        checkpoint_fingerprint=checkpoint_fingerprint,
        bench_fingerprint=bench,
        tokenizer_fingerprint=tokenizer,
        split=config.evaluation.split,
        examples_per_task=config.evaluation.examples_per_task,
        scoring=config.evaluation.scoring,
        inference_prefix=config.model.inference_prefix,
        max_new_tokens=config.evaluation.max_new_tokens,
        max_positions=longest_document(config),
        precision=config.training.precision,
    )


def task_fingerprint(conditions: Conditions, file_sha256: str, metric: str) -> str:
    """SHA-256 over the conditions, the bench file and its metric: equal means the results can be reused.

    The checkpoint's path does not count, its content does; nor do the other files of the bench.
    """
    facts = asdict(conditions)
    # A checkpoint that was moved, or another task added to the bench, changes no score here.
    for irrelevant in ("checkpoint", "bench_fingerprint"):
        del facts[irrelevant]
    # The version too: a mended metric gives other numbers for equal conditions.
    facts |= {"file_sha256": file_sha256, "metric": metric, "format_version": RESULT_FORMAT_VERSION}
    # Sorted: the order of the dataclass's fields is no condition.
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def check_comparable(conditions: Conditions, baseline: Conditions) -> None:
    """Raise ValueError if a baseline was evaluated under other conditions; the prefix may differ.

    The prefix belongs to the checkpoint: base OPT begins with `</s>`, a model tuned here with nothing.
    """
    ours, theirs = asdict(conditions), asdict(baseline)
    different = [
        f"{name}: got {theirs[name]}, needed {ours[name]}"
        for name in ours
        if name not in MAY_DIFFER_FROM_BASELINE and ours[name] != theirs[name]
    ]
    if different:
        raise ValueError(
            f"the baseline was evaluated under other conditions ({'; '.join(different)}); "
            "evaluate the baseline again with this config"
        )
