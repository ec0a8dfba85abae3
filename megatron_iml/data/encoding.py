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

import numpy as np

from megatron_iml.data.corpus_format import UInt16
from megatron_iml.data.tokenizer import Tokenizer

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
    if tokenizer.vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size} entries, the corpus stores ids as uint16 and "
            f"holds at most {LARGEST_VOCABULARY}; use a smaller vocabulary"
        )
    texts: list[str] = []
    joint: list[bool] = []
    for source, targets in examples:
        source = source.rstrip(" ")
        # After a non-space the space before the target always starts a new word (GPT-2's pattern): no merge
        # crosses the boundary, and encoding the parts apart saves encoding the source twice.
        apart = not source or not source[-1].isspace()
        texts.append(source)
        prefix = " " if apart else source + " "
        texts.extend([prefix + target.rstrip() for target in targets])
        joint.append(not apart)

    pieces = iter(_with_eos(tokenizer, texts))
    documents = []
    for (_, targets), is_joint in zip(examples, joint, strict=True):
        source_ids = next(pieces)[:-1]
        target_ids = [next(pieces) for _ in targets]
        if is_joint:
            documents.append(_split_joint(source_ids, target_ids))
        elif len(source_ids):
            documents.append([EncodedDocument(source_ids, tuple(target_ids), tuple(range(len(target_ids))))])
        else:
            documents.append([EncodedDocument(source_ids, (ids,), (i,)) for i, ids in enumerate(target_ids)])
    return documents


def _split_joint(source: UInt16, joint: Sequence[UInt16]) -> list[EncodedDocument]:
    """Split source + target encodings at the source's own length; group those that keep the source's ids."""
    # At least `</s>` stays a target, even where joining made fewer tokens of everything.
    splits = [min(len(source), len(ids) - 1) for ids in joint]
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
    stops = offsets[1:] + np.arange(1, len(offsets))
    with_eos = np.empty(len(ids) + len(texts), dtype=np.uint16)
    is_text = np.ones(len(with_eos), dtype=bool)
    is_text[stops - 1] = False
    with_eos[is_text] = ids
    with_eos[stops - 1] = tokenizer.eos_id
    starts = [0, *stops.tolist()]
    return [with_eos[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]
