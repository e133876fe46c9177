"""Packs: which rows they hold, what a batch is, resumption and ranks."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import messages, whole_and_resumed
from tiny_language_models import needs_packs
from transformers import LlamaConfig, LlamaForCausalLM

from manualloop import (
    ConfigError,
    DataError,
    NonFiniteError,
    TrainState,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
    train_steps,
)
from manualloop.data.packing import cut_sums, packed_batches, plan_packs
from manualloop.reading.ranks import Shard, ShardedSampler
from manualloop.tasks import chat


def some_lengths(num_rows, seed=0, most=2000):
    """Lengths as those of chats: many short ones, few long ones."""
    drawn = np.random.default_rng(seed).lognormal(5, 1, num_rows)
    return np.clip(drawn, 1, most).astype(np.int64)


def test_every_row_is_in_one_pack_and_every_pack_fits():
    for case in range(60):
        generator = random.Random(case)
        num_rows, most = generator.randint(1, 120), generator.choice([8, 64, 500])
        lengths = np.array([generator.randint(1, most) for _ in range(num_rows)])
        numbers = set()
        for epoch in range(4):
            packs = packed_batches(lengths, most, seed=case, epoch=epoch)
            assert sorted(row for pack in packs for row in pack) == list(range(num_rows))
            assert max(int(lengths[pack].sum()) for pack in packs) <= most
            numbers.add(len(packs))
            assert packs == packed_batches(lengths, most, seed=case, epoch=epoch, num_ranks=3)
        assert len(numbers) == 1


def best_fit_decreasing(slots, most):
    """The plan, written out: each slot into the fullest pack that it fits into."""
    packs = []
    for slot in sorted(slots, reverse=True):
        fitting = [pack for pack in packs if sum(pack) + slot <= most]
        if fitting:
            max(fitting, key=sum).append(slot)
        else:
            packs.append([slot])
    return packs


def test_the_plan_is_that_of_best_fit_decreasing():
    for case in range(100):
        generator = random.Random(case)
        slots = [generator.randint(1, 20) for _ in range(generator.randint(1, 60))]
        packs, wanted = plan_packs(np.array(slots), 20), best_fit_decreasing(slots, 20)
        assert sorted(map(sum, packs)) == sorted(map(sum, wanted))


def test_packs_are_full_and_hold_other_rows_in_each_epoch():
    lengths = some_lengths(5000)
    packs = packed_batches(lengths, 4096, seed=42, epoch=0)
    assert lengths.sum() / (len(packs) * 4096) >= 0.97
    others = packed_batches(lengths, 4096, seed=42, epoch=1)
    shared = {frozenset(pack) for pack in packs} & {frozenset(pack) for pack in others}
    assert len(shared) < len(packs) / 50
    assert [len(pack) for pack in packs] != [len(pack) for pack in others]


def test_rows_in_an_order_are_cut_where_the_next_does_not_fit():
    for case in range(50):
        generator = random.Random(case)
        lengths = np.array([generator.randint(1, 12) for _ in range(generator.randint(0, 30))])
        starts, room = [], 0
        for row, length in enumerate(lengths.tolist()):
            if not starts or length > room:
                starts.append(row)
                room = 10
            room -= length
        assert cut_sums(lengths, 10) == starts


DRAW = random.Random(0)
ROWS = [[DRAW.randint(3, 39) for _ in range(DRAW.randint(1, 20))] for _ in range(40)]


def data_of(rows=ROWS, **columns):
    return Dataset.from_dict({"input_ids": rows, "labels": rows, **columns})


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=1, **sizes)).double()


def exact(model, batch):
    """The model's loss in float64: that of transformers is computed in float32."""
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss, int((labels != -100).sum())


def packed(data=None, **arguments):
    arguments = {"max_tokens": 32, "pack": True, "model": tiny_llama()} | arguments
    return prepare_dataloaders(data_of() if data is None else data, **arguments)


def check_batch(batch, sampler_rows):
    """Compare a batch with the rows, one after the other."""
    rows = [ROWS[row] for row in sampler_rows]
    ids = [token for row in rows for token in row]
    labels = [token for row in rows for token in [-100, *row[1:]]]
    positions = [place for row in rows for place in range(len(row))]
    wanted = {"input_ids": ids, "labels": labels, "position_ids": positions}
    assert batch.keys() == wanted.keys()
    for name, column in wanted.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == [column]


@pytest.mark.parametrize("kind", ["table", "transform"])
def test_a_batch_is_its_rows_one_after_the_other(kind, caplog):
    transform = None
    if kind == "transform":

        def transform(row, generator):
            return {"input_ids": torch.tensor(row["input_ids"]), "labels": row["labels"]}

    loader = packed(transform=transform)["train"]
    for batch, rows in zip(loader, loader.batch_sampler.batches(), strict=True):
        check_batch(batch, rows)
    assert "40 rows in" in "".join(messages(caplog))


@needs_packs
def test_other_splits_are_padded_and_predicted_in_their_order():
    from helpers import tiny_tokenizer

    model = tiny_llama()
    data = {"train": data_of(), "validation": data_of()}
    loaders = packed(data, tokenizer=tiny_tokenizer(), model=model)
    assert set(next(iter(loaders["validation"]))) == {"input_ids", "attention_mask", "labels"}
    for loss_fn, most in ((exact, 1e-12), (None, 1e-6)):
        whole, in_packs = (
            evaluate_loop(model, loaders[split], "perplexity", loss_fn=loss_fn)
            for split in ("validation", "train")
        )
        assert in_packs["loss"] == pytest.approx(whole["loss"], rel=most)
        assert in_packs["perplexity"] == pytest.approx(whole["perplexity"], rel=10 * most)
    assert predict_loop(model, loaders["validation"]).index.tolist() == list(range(40))
    with pytest.raises(DataError, match="packed"):
        predict_loop(model, loaders["train"])


@needs_packs
def test_an_epoch_in_packs_is_the_update_of_all_rows():
    from helpers import tiny_tokenizer

    found = []
    for pack in (True, False):
        model = tiny_llama()
        loader = packed(tokenizer=tiny_tokenizer(), model=model, pack=pack)["train"]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        state = TrainState(model, optimizer, None)
        options = {"gradient_accumulation_steps": 100, "loss_fn": exact}
        for step in train_steps(state, loader, num_epochs=1, **options):
            assert step.num_items == sum(len(row) - 1 for row in ROWS)
        found.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert float((found[0] - found[1]).abs().max()) < 1e-12


@needs_packs
def test_a_run_resumes_inside_an_epoch(tmp_path):
    def run(folder, **options):
        model = tiny_llama()
        loader = packed(model=model, seed=3)["train"]
        optimizer = prepare_optimizer(model, lr=1e-2)
        return train_loop(
            model,
            loader,
            optimizer,
            num_epochs=2,
            checkpoint_dir=folder,
            checkpoint_every=3,
            progress_bar=False,
            **options,
        )

    whole_and_resumed(run, tmp_path, dies_after=5)


def test_the_position_counts_rows():
    sampler = packed()["train"].batch_sampler
    batches = sampler.batches()
    for number in range(len(batches)):
        sampler.start_at(sum(map(len, batches[:number])), sampler.own)
        assert sampler.num_left() == len(batches) - number
        assert list(sampler) == batches[number:]
    # With another budget the rows that are left are cut anew.
    other = packed(max_tokens=50)["train"].batch_sampler
    other.start_at(sum(map(len, batches[:3])), sampler.own)
    left = list(other)
    assert [r for batch in left for r in batch] == [r for batch in batches[3:] for r in batch]
    assert max(sum(len(ROWS[row]) for row in batch) for batch in left) <= 50


def test_packs_need_no_pad_token():
    from helpers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert len(packed(tokenizer=tokenizer)["train"]) > 1
    with pytest.raises(DataError, match="no pad token"):
        packed({"train": data_of(), "validation": data_of()}, tokenizer=tokenizer)


def test_a_row_of_a_pack_is_named_with_the_others(caplog):
    model = tiny_llama()
    loader = packed(model=model)["train"]

    def nan(model, batch):
        loss, num_items = exact(model, batch)
        return loss * float("nan"), num_items

    with pytest.raises(NonFiniteError) as caught:
        train_loop(model, loader, loss_fn=nan, max_steps=1, progress_bar=False)
    rows = ", ".join(map(str, loader.batch_sampler.batches()[0]))
    assert f"train batch 0 (row ids {rows})" in str(caught.value)


def test_ranks_get_as_many_packs():
    sampler = packed()["train"].batch_sampler
    shards = [ShardedSampler(sampler, Shard(rank, 3)) for rank in range(3)]
    read = [list(shard) for shard in shards]
    assert len({*map(len, read)}) == 1
    spare = [is_spare for shard in shards for _, _, _, is_spare in shard.rounds]
    used = [
        pack
        for shard, packs in zip(shards, read, strict=True)
        for pack, (_, _, _, is_spare) in zip(packs, shard.rounds, strict=True)
        if not is_spare
    ]
    assert sorted(r for pack in used for r in pack) == list(range(40))
    assert sum(spare) == -len(sampler) % 3


def test_kept_columns_have_an_entry_for_each_row():
    loader = packed(data_of(name=[str(n) for n in range(40)]), keep="name")["train"]
    batch, rows = next(iter(loader)), loader.batch_sampler.batches()[0]
    assert batch["name"] == [str(row) for row in rows]


def test_rows_without_labels_have_none():
    data = data_of().remove_columns("labels")
    assert set(next(iter(packed(data)["train"]))) == {"input_ids", "position_ids"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tokens": None}, "max_tokens=4096"),
        ({"group_by_length": True}, "Remove group_by_length"),
        ({"pad_to_multiple_of": 8}, "remove pad_to_multiple_of"),
        ({"drop_last": True}, "drop_last"),
        ({"collate_fn": lambda rows: rows}, "Remove one of the two arguments"),
        ({"max_tokens": 10}, "at most max_tokens=10"),
        ({"pack": "yes"}, "pack"),
        ({"task": "masked_lm"}, "are of a masked_lm"),
        ({"model": None}, 'task="causal_lm"'),
    ],
)
def test_what_cannot_be_packed_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        packed(**arguments)


def test_rows_that_cannot_be_packed_are_refused():
    with pytest.raises(ConfigError, match="several lists of tokens"):
        packed(data_of([[row, row] for row in ROWS]))
    with pytest.raises(ConfigError, match="is a stream"):
        packed(IterableDataset.from_generator(lambda: iter([{"input_ids": [1], "labels": [1]}])))
    masks = [[1] * len(row) for row in ROWS]
    assert "attention_mask" not in next(iter(packed(data_of(attention_mask=masks))["train"]))
    masks[3] = [0] * len(ROWS[3])
    with pytest.raises(DataError, match="hides tokens"):
        list(packed(data_of(attention_mask=masks))["train"])
    with pytest.raises(DataError, match=r"one number for each token|is not a list"):
        list(packed(data_of(token_type_ids=list(range(40))), model=None, task="causal_lm")["train"])


@needs_packs
def test_chats_are_packed(caplog):
    from chat_styles import random_chat, tokenizer_for

    tokenizer = tokenizer_for("chatml")
    generator = random.Random(0)
    chats = [random_chat(generator, "chatml") for _ in range(30)]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **sizes)
    model = LlamaForCausalLM(config)
    loaders = prepare_dataloaders(
        Dataset.from_dict({"messages": chats}),
        tokenizer,
        model=model,
        preprocess=chat(tokenizer, max_length=200),
        max_tokens=256,
        pack=True,
    )
    result = train_loop(model, loaders["train"], num_epochs=1, progress_bar=False)
    assert result.state.progress.num_steps == len(loaders["train"])
    said = "\n".join(messages(caplog))
    assert "train: 30 chats became" in said
    assert "packs of at most 256 tokens" in said
