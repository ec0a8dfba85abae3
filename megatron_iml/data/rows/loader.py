"""The rows of a plan: a corpus, a plan and the number of a row enter, a `Row` leaves.

    Loader(corpus, plan).layout(7)     the plan alone is read: what every stage of a pipeline needs
    Loader(corpus, plan).row(7)        its tokens too: what first and last stages need

Nothing is kept from row to row, so going on after a stop is asking for the next number.
"""

import numpy as np

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import Plan
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.data.rows.layout import RowLayout, allot_slots


class Loader:
    """Turns rows of a plan into `Row`s; its whole state is which row is asked for."""

    def __init__(self, corpus: Corpus, plan: Plan) -> None:
        """Pair a plan with its corpus. Raises ValueError when the plan was made from another one."""
        if plan.corpus_fingerprint != corpus.fingerprint:
            raise ValueError(
                f"plan {plan.folder} was made from corpus {plan.corpus_fingerprint}, but {corpus.folder} is "
                f"{corpus.fingerprint}; rebuild the plan with tools/preprocess/build_plan.py"
            )
        self.corpus = corpus
        self.plan = plan

    def layout(self, row: int) -> RowLayout:
        """Return where documents lie in a row; reads the plan only, no tokens."""
        entries = self.plan.entries(row)
        lengths_N, shared_N, trunks_N = (
            entries[name].astype(np.int64) for name in ("length", "shared", "trunk")
        )
        # The same function as in `row`: stages that read no tokens must not see another mask.
        slots = allot_slots(lengths_N, shared_N, trunks_N, self.plan.row_length)
        # Counting targets would take the lengths of sources, which are in the corpus.
        return slots.layout(row, int(self.plan.targets_R[row]))

    def row(self, row: int) -> Row:
        """Return a row with its tokens and targets."""
        pieces = []
        for document, cut, reference, length, shared, trunk in self.plan.entries(row).tolist():
            tokens, source_length = self.corpus.tokens(document, reference)
            # Fingerprints are of manifests: this catches other bytes under the same one.
            assert len(tokens) - cut == length, (
                f"document {document}: {len(tokens)} - {cut} tokens, plan {length}"
            )
            # Cut from the left, so all that is lost is source.
            pieces.append(Piece(tokens[cut:], source_length - cut, trunk, shared))
        assembled = assemble_row(pieces, self.plan.row_length, row)
        expected = int(self.plan.targets_R[row])
        # The loss is divided by the plan's number: one target more would pass unnoticed.
        found = assembled.layout.num_targets
        assert found == expected, f"row {row} has {found} targets, the plan says {expected}"
        return assembled
