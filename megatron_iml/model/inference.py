"""The model as evaluation sees it: losses of packed rows, and greedy decoding with a cache.

    scorer = InferenceModel(chunk, layout, vocab_entries=50265)
    scorer.target_losses(row)                    # fp32 [M], numpy
    cache, next_B = scorer.prefill(prompts)      # prompts: integer arrays, any lengths
    next_B = scorer.decode(cache, next_B)        # one more token per sequence

Tensor and data parallelism work as in training; neither a pipeline nor sequence parallelism is used, because
a checkpoint loads under another layout. Every tensor rank calls with the same arguments.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.parallel.groups import Layout

from .cache import DecodeContext, KeyValueCache
from .opt import OPTModel
from .row import RowContext, to_device

Tokens = NDArray[np.integer]


class InferenceModel:
    """One whole OPT in evaluation mode: no dropout, no gradients."""

    def __init__(self, model: OPTModel, layout: Layout, vocab_entries: int, max_positions: int) -> None:
        """Wrap a model without pipeline parallelism.

        Args:
            model: the single chunk.
            layout: this rank's place.
            vocab_entries: real entries of the tokenizer; padded rows are never generated.
            max_positions: positions a sequence may reach.
        """
        assert layout.pipeline_size == 1, (
            f"inference runs without a pipeline, got {layout.pipeline_size} stages"
        )
        assert not model.config.sequence_parallel, "a step's few tokens are not cut over tensor ranks"
        self.model, self.layout = model.eval(), layout
        self.vocab_entries, self.max_positions = vocab_entries, max_positions

    @torch.no_grad()
    def target_losses(self, row: Row) -> NDArray[np.float32]:
        """Negative log-likelihood of every target of a packed row, in the row's order."""
        return self.model(to_device(row, self.layout.device)).losses_M.cpu().numpy()

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tokens], max_new_tokens: int) -> tuple[KeyValueCache, Tokens]:
        """Read the prompts together, packed in one row.

        Args:
            prompts: token ids, at least one each, at most max_positions - max_new_tokens + 1 long.
            max_new_tokens: room the cache keeps for every sequence.

        Returns:
            The cache and the most likely next token of each prompt, int64 [B].
        """
        lengths = [len(prompt) for prompt in prompts]
        assert min(lengths) > 0, "an empty prompt has no next token: put a prefix token before it"
        assert max(lengths) + max_new_tokens - 1 <= self.max_positions, (
            f"prompt of {max(lengths)} and {max_new_tokens} new tokens exceed {self.max_positions} positions"
        )
        # A document's last token is not read by a training row; a throw-away token makes every prompt token
        # read.
        pieces = [Piece(np.append(prompt, 0), len(prompt)) for prompt in prompts]
        batch = to_device(assemble_row(pieces, sum(lengths), index=0), self.layout.device)
        # Documents lie in the row without gaps, so prompt i starts where i - 1 ends.
        starts = np.cumsum([0, *lengths[:-1]])
        cache = KeyValueCache(
            starts=starts.tolist(),
            lengths_B=torch.tensor(lengths, device=self.layout.device),
            capacity=max(lengths) + max_new_tokens - 1,
        )
        # Any row number will do: it is for dropout.
        context = RowContext(row=0, bounds=batch.context.bounds, cache=cache)
        last_rows_B = torch.from_numpy(starts + np.array(lengths) - 1).to(self.layout.device)
        assert batch.tokens_T is not None, "a whole row carries its tokens"
        logits_BV = self.model.next_token_logits(batch.tokens_T, batch.positions_T, context, last_rows_B)
        return cache, self._most_likely(logits_BV)

    @torch.no_grad()
    def decode(self, cache: KeyValueCache, tokens_B: Tokens) -> Tokens:
        """Append one token to every cached sequence and return the most likely next ones, int64 [B]."""
        logits_BV = self.model.next_token_logits(
            torch.from_numpy(np.asarray(tokens_B, dtype=np.int64)).to(self.layout.device),
            # The next token of a sequence of n stands at position n.
            cache.lengths_B,
            DecodeContext(cache),
            torch.arange(len(tokens_B), device=self.layout.device),
        )
        cache.advance()
        return self._most_likely(logits_BV)

    def _most_likely(self, logits_BV: Tensor) -> Tokens:
        # Rows that pad the vocabulary have logits too, and an untrained row can win.
        return logits_BV[:, : self.vocab_entries].argmax(dim=1).cpu().numpy()
