"""The promise "same numbers": the course's loop, written out, beside ours; every bit compared."""

import random

import pytest
import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from manualloop import (
    apply_update,
    evaluate_loop,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_scheduler,
    train_loop,
)

NUM_ROWS = 51  # 7 batches of 8, the last of 3 rows: both epochs end in a short batch and window
NUM_BATCHES = 7
NUM_EPOCHS = 2
LR = 1e-3


@pytest.fixture(scope="module")
def rows(shared):
    """Tokenized rows of MRPC."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/bert-base-uncased")
    raw = load_dataset(str(shared / "glue/mrpc"), split=f"train[:{NUM_ROWS}]")
    tokenized = raw.map(
        lambda row: tokenizer(row["sentence1"], row["sentence2"], truncation=True), batched=True
    )
    tokenized = tokenized.remove_columns(["sentence1", "sentence2", "idx"])
    return tokenized.rename_column("label", "labels"), DataCollatorWithPadding(tokenizer)


def new_model():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=2,
    )
    assert config.hidden_dropout_prob == 0.1
    return BertForSequenceClassification(config)


def course_loop(model, loader_of_epoch, *, fused, accumulation=1, max_grad_norm=None):
    """Chapter 3's loop, with the accumulation and the clipping that the course leaves out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=fused)
    num_updates = -(-len(loader_of_epoch(0)) // accumulation)
    lr_scheduler = get_scheduler(
        "linear",
        optimizer=optimizer,
        num_warmup_steps=0,
        num_training_steps=NUM_EPOCHS * num_updates,
    )
    losses, norms = [], []
    model.train()
    for epoch in range(NUM_EPOCHS):
        window = []
        loader = loader_of_epoch(epoch)
        for number, batch in enumerate(loader, start=1):
            window.append(batch)
            if len(window) < accumulation and number < len(loader):
                continue
            num_rows = sum(len(batch["labels"]) for batch in window)
            window_loss = 0.0
            for batch in window:
                outputs = model(**batch)
                loss = outputs.loss
                if len(window) > 1:
                    loss = loss * (len(batch["labels"]) / num_rows)
                loss.backward()
                window_loss = window_loss + loss.detach()
            if max_grad_norm is not None:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            losses.append(window_loss)
            window = []
    return losses, norms


def assert_same_bits(ours, theirs):
    theirs = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), f"{name} differs"


@pytest.mark.shared
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_prepared_loader_equals_the_course_loop(rows, fused, accumulation, max_grad_norm):
    dataset, collator = rows

    def loader_of_epoch(epoch):
        order = RandomSampler(dataset, generator=torch.Generator().manual_seed(42 + epoch))
        return DataLoader(
            dataset, 8, sampler=order, collate_fn=collator, generator=torch.Generator()
        )

    theirs = new_model()
    torch.manual_seed(1)
    their_losses, their_norms = course_loop(
        theirs, loader_of_epoch, fused=fused, accumulation=accumulation, max_grad_norm=max_grad_norm
    )

    ours, steps = new_model(), []
    loader = prepare_dataloaders(dataset, collator.tokenizer)["train"]
    torch.manual_seed(1)
    train_loop(
        ours,
        loader,
        prepare_optimizer(ours, lr=LR, fused=fused),
        num_epochs=NUM_EPOCHS,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
        on_step=steps.append,
        progress_bar=False,
    )
    assert len(steps) == NUM_EPOCHS * -(-NUM_BATCHES // accumulation)
    assert [float(step.loss) for step in steps] == [float(loss) for loss in their_losses]
    if max_grad_norm is not None:
        assert [float(step.grad_norm) for step in steps] == [float(norm) for norm in their_norms]
    assert_same_bits(ours, theirs)


@pytest.mark.shared
def test_a_loader_built_by_the_user_equals_the_course_loop_with_the_same_draws(rows):
    """DataLoader(shuffle=True) draws from the global generator; we draw nothing in between."""
    dataset, collator = rows
    theirs, ours = new_model(), new_model()
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collator)
    torch.manual_seed(1)
    their_losses, _ = course_loop(theirs, lambda epoch: loader, fused=False)

    steps = []
    optimizer = torch.optim.AdamW(ours.parameters(), lr=LR, weight_decay=0.0)
    torch.manual_seed(1)
    train_loop(
        ours,
        loader,
        optimizer,
        prepare_scheduler(optimizer, num_training_steps=NUM_EPOCHS * NUM_BATCHES),
        num_epochs=NUM_EPOCHS,
        on_step=steps.append,
        progress_bar=False,
    )
    assert [float(step.loss) for step in steps] == [float(loss) for loss in their_losses]
    assert_same_bits(ours, theirs)


@pytest.mark.shared
def test_evaluating_in_the_middle_changes_nothing(rows):
    dataset, collator = rows
    loaders = prepare_dataloaders(
        {"train": dataset, "validation": dataset}, collator.tokenizer, batch_size=8
    )
    shuffled = DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collator)
    models = [new_model(), new_model()]
    for model, evaluate in zip(
        models, (None, lambda: evaluate_loop(models[1], shuffled)), strict=True
    ):
        torch.manual_seed(1)
        train_loop(
            model,
            loaders["train"],
            prepare_optimizer(model, lr=LR),
            num_epochs=NUM_EPOCHS,
            evaluate=evaluate,
            evaluate_every=2,
            progress_bar=False,
        )
    assert_same_bits(*models)


class SeedEveryStep(TrainerCallback):
    """Dropout then draws the same numbers, whatever the Trainer draws between two steps."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(1000 + state.global_step)


@pytest.mark.shared
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_equals_the_trainer_where_the_trainer_is_right(rows, max_grad_norm, tmp_path):
    """Both with their defaults: order, optimizer, schedule. Accumulation 1: pitfalls 1."""
    dataset, collator = rows
    theirs, their_losses = new_model(), []

    class RecordingTrainer(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            their_losses.append(float(loss.detach()))
            return loss

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=NUM_EPOCHS,
        max_grad_norm=max_grad_norm or 0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = RecordingTrainer(
        theirs,
        arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[SeedEveryStep()],
    )
    trainer.train()

    def seeded_update(state, batches, strategy):
        torch.manual_seed(1000 + state.progress.num_steps)
        return apply_update(state, batches, strategy, max_grad_norm=max_grad_norm)

    ours, steps = new_model(), []
    train_loop(
        ours,
        prepare_dataloaders(dataset, collator.tokenizer)["train"],
        num_epochs=NUM_EPOCHS,
        step_fn=seeded_update,
        on_step=steps.append,
        progress_bar=False,
    )
    assert [float(step.loss) for step in steps] == their_losses
    assert_same_bits(ours, theirs)


def test_a_model_of_ones_own_with_random_rows_equals_the_loop_written_out():
    """No transformers in it, no shared data: tensors, a Linear, dropout, a loss function."""
    random.seed(0)
    rows = Dataset.from_list(
        [{"x": [random.gauss(0, 1) for _ in range(4)], "labels": n % 3} for n in range(50)]
    )

    def model_of_ones_own():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 3))

    theirs, ours = model_of_ones_own(), model_of_ones_own()
    loader = DataLoader(rows.with_format("torch"), batch_size=8, shuffle=True)
    cross_entropy = torch.nn.functional.cross_entropy
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(3)
    their_losses = []
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            loss = cross_entropy(theirs(batch["x"]), batch["labels"])
            loss.backward()
            optimizer.step()
            their_losses.append(float(loss.detach()))

    our_losses = []
    torch.manual_seed(3)
    train_loop(
        ours,
        loader,
        torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9),
        None,
        num_epochs=2,
        loss_fn=lambda model, batch: cross_entropy(model(batch["x"]), batch["labels"]),
        on_step=lambda step: our_losses.append(float(step.loss)),
        progress_bar=False,
    )
    assert our_losses == their_losses
    assert_same_bits(ours, theirs)
