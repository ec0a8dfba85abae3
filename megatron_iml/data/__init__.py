"""From benchmark files to rows of token ids; numpy and tokenizers only, no torch."""
