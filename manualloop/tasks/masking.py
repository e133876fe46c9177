"""Masked language modelling: tokens of a row are hidden at random, and are its labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from manualloop.errors import ConfigError, DataError
from manualloop.tasks.task import IGNORE_INDEX

_HIDDEN, _REPLACED = 0.8, 0.1  # shares of the chosen tokens; the rest stays


def mask_tokens(tokenizer: Any, probability: float = 0.15) -> MaskTokens:
    """Return a ``transform`` that chooses tokens of a row, hides them, and makes them its labels.

    Each token is chosen by itself. Of those chosen 80 % become the mask token, 10 % any token of
    the vocabulary, and 10 % stay as they are (Devlin et al., "BERT", 2019), as in transformers'
    ``DataCollatorForLanguageModeling``. Special tokens are never chosen. Of a row of which chance
    chooses no token one is chosen all the same, as in BERT's own code, so that no row is read in
    vain; this concerns short rows, such as 44 % of those with 5 tokens. A row of special tokens
    alone has no label, and does not count in the loss.

    What is chosen is a function of seed, epoch and row: other tokens in each epoch of training, the
    same in each evaluation.

    Args:
        tokenizer: Tokenizer of the model, with a mask token.
        probability: Probability with which a token is chosen.

    Returns:
        A function for ``prepare_dataloaders(transform=)`` of rows with ``input_ids``, such as
        ``preprocess=cut(tokenizer, max_length=512)`` makes them.

    Raises:
        ConfigError: The tokenizer has no mask token, or the probability is none.
    """
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ConfigError(
            "The tokenizer has no mask token. For a causal language model leave mask_tokens out; "
            'for a masked one add the token: tokenizer.add_special_tokens({"mask_token": "[MASK]"})'
            "; model.resize_token_embeddings(len(tokenizer))."
        )
    if not isinstance(probability, float | int) or not 0 < probability <= 1:
        raise ConfigError(f"probability must be above 0 and at most 1, got {probability!r}.")
    special = frozenset(tokenizer.all_special_ids)
    return MaskTokens(float(probability), tokenizer.mask_token_id, len(tokenizer), special)


@dataclass(frozen=True)
class MaskTokens:
    """What ``mask_tokens`` returns.

    Attributes:
        probability: Probability with which a token is chosen.
        mask: The token that hides others.
        num_tokens: Number of tokens in the vocabulary.
        special: Tokens that are never chosen.
    """

    probability: float
    mask: int
    num_tokens: int
    special: frozenset[int]

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the row with hidden tokens, and the labels.

        Raises:
            DataError: The row is not tokenized.
        """
        if "input_ids" not in row:
            raise DataError(
                f"mask_tokens hides tokens, and a row has only {', '.join(row)}. Tokenize first: "
                "prepare_dataloaders(..., preprocess=cut(tokenizer, max_length=512))."
            )
        ids = torch.as_tensor(row["input_ids"])
        is_free = torch.tensor([token not in self.special for token in ids.tolist()])
        chance, kind = torch.rand(2, len(ids), generator=generator)
        chosen = (chance < self.probability) & is_free
        others = torch.randint(self.num_tokens, (len(ids),), generator=generator)
        places = is_free.nonzero().flatten()
        if not chosen.any() and len(places):
            drawn = torch.randint(len(places), (1,), generator=generator)
            chosen[places[drawn]] = True
        hidden = torch.where(chosen & (kind < _HIDDEN + _REPLACED), others, ids)
        hidden = torch.where(chosen & (kind < _HIDDEN), self.mask, hidden)
        labels = torch.where(chosen, ids, IGNORE_INDEX)
        return {**row, "input_ids": hidden.tolist(), "labels": labels.tolist()}
