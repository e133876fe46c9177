"""Tiny causal language models and batches for them, the same at every call."""

import pytest
import torch
import transformers

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
TELLS_PACKS_APART = VERSION >= (4, 53)
needs_packs = pytest.mark.skipif(
    not TELLS_PACKS_APART,
    reason=f"transformers {transformers.__version__} does not tell documents apart by positions",
)

needs_transformers_5 = pytest.mark.skipif(
    VERSION < (5, 0),
    reason=f"transformers {transformers.__version__} builds and pads in another way",
)

VOCAB = 41
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


def llama(seed=0, kind="LlamaForCausalLM", **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, kind)(transformers.LlamaConfig(**{**SIZES, **config})).double()


def gpt2(**config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**{**sizes, **dropout, **ends, **config})
        return transformers.GPT2LMHeadModel(config).double()


def of_kind(name, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **config})
        return getattr(transformers, f"{name}ForCausalLM")(config).double()


def rows_of(lengths, seed=0, prompt=0.5):
    """Rows of tokens, of which the first share has no label."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        start = int(prompt * length)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def padded(rows, left=False):
    """A batch of rows, padded by 0."""
    ends = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    width = max(len(row["input_ids"]) for row in rows)
    batch = {name: torch.full((len(rows), width), end) for name, end in ends.items()}
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        cut = slice(width - length, width) if left else slice(length)
        batch["attention_mask"][number, cut] = 1
        for name in ("input_ids", "labels"):
            batch[name][number, cut] = torch.tensor(row[name])
    return batch


def pairs_of(number, seed=0, longest=9):
    """Pairs of rows with a common beginning, as preference_pairs makes them."""
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(number):
        prompt = torch.randint(3, VOCAB, (3,), generator=draw).tolist()
        lengths = torch.randint(1, longest, (2,), generator=draw).tolist()
        answers = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in lengths]
        pairs.append(
            {
                "input_ids": [prompt + answer for answer in answers],
                "labels": [[-100] * 3 + answer for answer in answers],
            }
        )
    return pairs


def paired(pairs, **columns):
    """A batch of pairs, ``(pairs, 2, tokens)``."""
    rows = [
        {name: pair[name][half] for name in ("input_ids", "labels")}
        for pair in pairs
        for half in (0, 1)
    ]
    batch = {name: c.view(len(pairs), 2, -1) for name, c in padded(rows).items()}
    return batch | {name: [pair[name] for pair in pairs] for name in columns.get("keep", ())}


def gradients(model):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def apart(ours, theirs):
    """The largest difference of a gradient, relative to the largest gradient."""
    assert ours.keys() == theirs.keys()
    size = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / size
