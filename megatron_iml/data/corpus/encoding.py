"""How an example becomes token ids: one source sequence and one or more target sequences.

    "Capital of Togo?\\nAnswer:", ["Lome"]  ->  source [38632 9 255 14744 116 50118 33683 35]
                                            target [226 4399 2]

Text becomes tokens as OPT-IML's trainer made them: blanks at the end of the source and all space at the end
of the target are removed, the two are joined by one space and encoded *together*, the source being the first
`len(encode(source))` of the ids; the target ends with `</s>`. A document without a source (pretraining text)
is one sequence, all target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megatron_iml.data.corpus.format import UInt16
from megatron_iml.data.corpus.tokenizer import Tokenizer

LARGEST_VOCABULARY = 1 << 16  # ids are stored as uint16


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDocument:
    """A document as it is stored: source ids (none: all is target) and targets that end with `</s>`.

    `references[i]` says which of the texts given `targets[i]` encodes.
    """

    source: UInt16
    targets: tuple[UInt16, ...]
    references: tuple[int, ...]

    @property
    def sequences(self) -> tuple[UInt16, ...]:
        """The stored sequences in their order."""
        return (self.source, *self.targets) if len(self.source) else self.targets


@dataclass(frozen=True, slots=True, eq=False)
class FlatDocuments:
    """Many documents end to end, as a shard stores them: T tokens in S sequences in D documents."""

    ids_T: UInt16
    sizes_S: NDArray[np.int32]
    counts_D: NDArray[np.int32]
    """Sequences of every document."""
    target_tokens: int


def encode_document(tokenizer: Tokenizer, source: str, targets: Sequence[str]) -> list[EncodedDocument]:
    """Encode one example: one document, plus one per reference whose joint encoding changes the source's ids.

    Without a source every target is a document of its own, since a document's first of several sequences is
    its source. The order is that of `targets`.
    """
    return encode_documents(tokenizer, [(source, targets)])[0]


def encode_documents(
    tokenizer: Tokenizer, examples: Sequence[tuple[str, Sequence[str]]]
) -> list[list[EncodedDocument]]:
    """Encode many examples in one batch, each as `encode_document` does."""
    _check_vocabulary_size(tokenizer)
    texts: list[str] = []
    joint: list[bool] = []
    for source, targets in examples:
        source = source.rstrip(" ")
        apart = _encodes_apart(source)
        texts.append(source)
        # The space stands there without a source too: OPT-IML's trainer joined whatever the source was.
        prefix = " " if apart else source + " "
        texts.extend([prefix + target.rstrip() for target in targets])
        joint.append(not apart)

    pieces = iter(_with_eos(tokenizer, texts))
    documents = []
    for (_, targets), is_joint in zip(examples, joint, strict=True):
        # Every text has got its `</s>`, which a source does not end with.
        source_ids = next(pieces)[:-1]
        target_ids = [next(pieces) for _ in targets]
        if is_joint:
            documents.append(_split_joint(source_ids, target_ids))
        elif len(source_ids):
            documents.append([EncodedDocument(source_ids, tuple(target_ids), tuple(range(len(target_ids))))])
        else:
            documents.append([EncodedDocument(source_ids, (ids,), (i,)) for i, ids in enumerate(target_ids)])
    return documents


def encode_flat_documents(
    tokenizer: Tokenizer, examples: Sequence[tuple[str, Sequence[str]]]
) -> FlatDocuments:
    """Encode many examples to the ids of `encode_documents`, without an object for every document."""
    _check_vocabulary_size(tokenizer)
    stripped = [(source.rstrip(" "), targets) for source, targets in examples]
    # Runs of either kind, so that documents stay in their order; nearly always there is one run.
    parts = [
        _encode_apart(tokenizer, list(run)) if apart else _flatten(encode_documents(tokenizer, list(run)))
        for apart, run in groupby(stripped, key=lambda example: _encodes_apart(example[0]))
    ]
    return FlatDocuments(
        np.concatenate([part.ids_T for part in parts]),
        np.concatenate([part.sizes_S for part in parts]),
        np.concatenate([part.counts_D for part in parts]),
        sum(part.target_tokens for part in parts),
    )


def _encode_apart(tokenizer: Tokenizer, examples: Sequence[tuple[str, Sequence[str]]]) -> FlatDocuments:
    texts: list[str] = []
    is_target: list[bool] = []
    counts: list[int] = []
    for source, targets in examples:
        if source:
            texts.append(source)
            is_target.append(False)
            counts.append(1 + len(targets))
        else:
            # A document's first of several sequences is its source, so these stand alone.
            counts.extend([1] * len(targets))
        texts.extend([" " + target.rstrip() for target in targets])
        is_target.extend([True] * len(targets))
    ids, offsets = tokenizer.encode_flat(texts)
    is_target_S = np.array(is_target)
    # Room for `</s>` behind every target.
    sizes_S = np.diff(offsets) + is_target_S
    ids_T = np.empty(len(ids) + np.count_nonzero(is_target_S), dtype=np.uint16)
    is_eos_T = np.zeros(len(ids_T), dtype=bool)
    is_eos_T[(np.cumsum(sizes_S) - 1)[is_target_S]] = True
    ids_T[is_eos_T] = tokenizer.eos_id
    # All other places, in their order, take the ids as they come.
    ids_T[~is_eos_T] = ids
    return FlatDocuments(
        ids_T, sizes_S.astype(np.int32), np.array(counts, dtype=np.int32), int(sizes_S[is_target_S].sum())
    )


def _flatten(examples: Sequence[Sequence[EncodedDocument]]) -> FlatDocuments:
    documents = [document for example in examples for document in example]
    sequences = [sequence for document in documents for sequence in document.sequences]
    return FlatDocuments(
        np.concatenate(sequences),
        np.array([len(sequence) for sequence in sequences], dtype=np.int32),
        np.array([len(document.sequences) for document in documents], dtype=np.int32),
        sum(len(target) for document in documents for target in document.targets),
    )


def _encodes_apart(source: str) -> bool:
    # After a non-space the space before the target always starts a new word (GPT-2's pattern): no merge
    # crosses the boundary, and encoding the parts apart saves encoding the source twice.
    return not source or not source[-1].isspace()


def _check_vocabulary_size(tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} entries, the corpus stores ids as uint16 and "
            f"holds at most {LARGEST_VOCABULARY}; use a smaller vocabulary"
        )


def _split_joint(source: UInt16, joint: Sequence[UInt16]) -> list[EncodedDocument]:
    """Split source + target encodings at the source's own length; group those that keep the source's ids."""
    # At least `</s>` stays a target, even where joining made fewer tokens of everything.
    splits = [min(len(source), len(ids) - 1) for ids in joint]
    # What is kept begins with the ids that the source has alone, so one stored source serves all of these.
    kept = [i for i, ids in enumerate(joint) if np.array_equal(ids[: splits[i]], source)]
    documents = [
        EncodedDocument(joint[i][: splits[i]], (joint[i][splits[i] :],), (i,)) for i in range(len(joint))
    ]
    if not kept:
        return documents
    # In the place of the first of them, so that the order of references is kept.
    together = EncodedDocument(source, tuple(joint[i][splits[i] :] for i in kept), tuple(kept))
    return [together if i == kept[0] else documents[i] for i in range(len(joint)) if i not in kept[1:]]


def _with_eos(tokenizer: Tokenizer, texts: Sequence[str]) -> list[UInt16]:
    """Encode texts, each with `</s>` at its end; views of one array, so that no ids are copied one by one."""
    ids, offsets = tokenizer.encode_flat(texts)
    # Every text is one id longer than it was, so text n ends n + 1 later.
    stops = offsets[1:] + np.arange(1, len(offsets))
    with_eos = np.empty(len(ids) + len(texts), dtype=np.uint16)
    is_text = np.ones(len(with_eos), dtype=bool)
    is_text[stops - 1] = False
    with_eos[is_text] = ids
    with_eos[stops - 1] = tokenizer.eos_id
    starts = [0, *stops.tolist()]
    return [with_eos[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
