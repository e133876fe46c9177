"""dpo, reward and reference_logps: the formulas, any split, and a reference that stays as it is."""

import copy
import json
import logging
import pickle

import pytest
import torch
from datasets import Dataset
from helpers import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from tiny_language_models import apart, gpt2, gradients, llama, paired, pairs_of
from torch.nn.functional import logsigmoid

from manualloop import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    TrainState,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
    prepare_dataloaders,
    train_loop,
    train_steps,
)
from manualloop.tasks import distil, dpo, margins, preferred, reference_logps, reward

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft

PAIRS = pairs_of(5)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def logps_of(model, pairs):
    """The log-probabilities of both answers of each pair, each row by itself."""
    found = []
    for pair in pairs:
        for ids, labels in zip(pair["input_ids"], pair["labels"], strict=True):
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            kept = [(at, token) for at, token in enumerate(labels[1:]) if token != -100]
            found.append(sum(logits[at, token] for at, token in kept))
    return torch.stack(found).view(-1, 2)


def written_out(model, reference, pairs, beta, kind):
    with torch.no_grad():
        before = logps_of(reference, pairs)
    ratios = logps_of(model, pairs) - before
    if kind == "ipo":
        counts = [[sum(t != -100 for t in row) for row in pair["labels"]] for pair in pairs]
        ratios = ratios / torch.tensor(counts)
        return ((ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)) ** 2).mean()
    apart = beta * (ratios[:, 0] - ratios[:, 1])
    return (torch.relu(1 - apart) if kind == "hinge" else -logsigmoid(apart)).mean()


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_the_formula(kind):
    model, reference = llama(), llama(seed=1)
    loss_fn = dpo(0.3, reference=reference, kind=kind)
    loss, items = loss_fn(model, paired(PAIRS))
    expected = written_out(model, reference, PAIRS, 0.3, kind)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert apart(gradient_of(model, loss), gradient_of(model, expected)) < 1e-11
    assert items == loss_fn.items(paired(PAIRS)) == 5


def with_column(model, pairs):
    column = reference_logps(model, pairs, batch_size=2)
    return [pair | {"reference": values} for pair, values in zip(pairs, column, strict=True)]


def test_any_split_is_the_same_update_with_each_reference():
    reference = llama(seed=1)
    adapted = get_peft_model(llama(), LORA).double()
    rows = with_column(reference, PAIRS)
    cases = [
        (llama(), dpo(reference=reference), {}),
        (llama(), dpo(), {"keep": ("reference",)}),
        (adapted, dpo(), {}),
    ]
    for model, loss_fn, options in cases:
        expected = gradient_of(model, loss_fn(model, paired(rows, **options))[0])
        model.zero_grad()
        parts = [paired(part, **options) for part in (rows[:3], rows[3:4], rows[4:])]
        update = accumulate_gradients(model, parts, loss_fn=loss_fn)
        assert update.num_items == 5
        assert apart(gradients(model), expected) < 1e-12
        report = check_accumulation(model, paired(rows, **options), loss_fn=loss_fn)
        assert report.is_exact, report


def test_single_precision_is_not_accused():
    """Its items are pairs; those that the task would count are tokens."""
    report = check_accumulation(
        llama().float(), paired(PAIRS), loss_fn=dpo(reference=llama(seed=1).float())
    )
    assert report.is_exact, report
    assert report.num_items == 5


def test_short_windows_of_an_epoch_are_exact():
    ends = []
    for size in (1, 2):
        model = llama()
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.5))
        loader = [paired(PAIRS[at : at + size]) for at in range(0, 5, size)]
        options = {"num_epochs": 1, "gradient_accumulation_steps": 4 // size}
        for _ in train_steps(state, loader, loss_fn=dpo(reference=llama(seed=1)), **options):
            pass
        ends.append({name: weight.detach() for name, weight in model.named_parameters()})
    assert apart(*ends) < 1e-12


def test_the_column_is_the_reference():
    model, reference = llama(), llama(seed=1)
    expected, _ = dpo(reference=reference)(model, paired(PAIRS))
    rows = with_column(reference, PAIRS)
    batch = paired(rows, keep=("reference",))
    found, _ = dpo()(model, batch)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    tensors = batch | {"reference": torch.tensor(batch["reference"], dtype=torch.float64)}
    assert float(dpo()(model, tensors)[0].detach()) == float(found.detach())
    bare = batch | {"reference": [values[:2] for values in batch["reference"]]}
    assert dpo().items(bare) == 5  # a column of somebody else's has no check sums
    assert float(dpo()(model, bare)[0].detach()) == float(found.detach())


def test_a_column_of_other_tokens_is_refused(updates):
    rows = with_column(llama(seed=1), PAIRS)
    swapped = [rows[0] | {"reference": rows[1]["reference"]}, *rows[1:]]
    turned = [rows[0] | {n: rows[0][n][::-1] for n in ("input_ids", "labels")}, *rows[1:]]
    labels = copy.deepcopy(rows)
    labels[2]["labels"][1][-1] = -100
    single, right = (torch.tensor([row["reference"] for row in some]) for some in (swapped, rows))
    assert single.dtype == torch.float32
    batches = [paired(some, keep=("reference",)) for some in (swapped, turned, labels)]
    for batch in [*batches, paired(swapped) | {"reference": single}]:
        with pytest.raises(DataError, match=r"does not belong to the tokens .* reference_logps"):
            train_loop(llama(), [batch], loss_fn=dpo(), max_steps=1, progress_bar=False)
    assert not updates
    assert dpo().items(paired(rows) | {"reference": right}) == 5


def test_reference_logps_are_those_of_each_row_alone():
    model = gpt2(resid_pdrop=0.4, embd_pdrop=0.4)
    found = torch.tensor(reference_logps(model, PAIRS, batch_size=2))[:, :2]
    assert model.training
    with torch.no_grad():
        expected = logps_of(model.eval(), PAIRS)
    assert torch.allclose(found.double(), expected, rtol=1e-6)
    for rows in ({"input_ids": []}, iter(PAIRS)):
        with pytest.raises(DataError, match="takes rows"):
            reference_logps(model, rows)
    with pytest.raises(DataError, match="Row 1 is no pair"):
        reference_logps(model, [PAIRS[0], {"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(ConfigError, match="batch_size"):
        reference_logps(model, PAIRS, batch_size=0)
    with pytest.raises(DataError, match=r"preference_pairs\(tokenizer, max_length=8\)"):
        reference_logps(gpt2(n_positions=8), PAIRS)


def test_a_file_of_reference_logps_is_read_if_it_is_of_the_same(tmp_path, caplog):
    caplog.set_level(logging.INFO, "manualloop")
    path, model = tmp_path / "reference.json", llama()
    first = reference_logps(model, PAIRS, path=path)
    again = reference_logps(model, PAIRS, path=path)
    assert again == first
    assert "read from" in caplog.messages[-1]
    assert reference_logps(llama(seed=1), PAIRS, path=path) != first
    assert any("of other weights" in line for line in caplog.messages)
    assert len(reference_logps(llama(seed=1), PAIRS[:3], path=path)) == 3
    assert any("of other rows" in line for line in caplog.messages)
    path.write_text(json.dumps({"rows": 3}))
    assert reference_logps(model, PAIRS, path=path) == first
    assert [*tmp_path.iterdir()] == [path]


def test_adapters_off_is_the_base_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    base = gpt2(resid_pdrop=0.3)
    reference = copy.deepcopy(base).eval()
    options = {"init_lora_weights": False, "lora_dropout": 0.2, "fan_in_fan_out": True}
    model = get_peft_model(base, LoraConfig(r=2, **options)).double()
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)  # which PEFT would make trainable
    model.base_model.model.transformer.h[0].mlp.eval()
    before = [weight.requires_grad for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    ours, _ = dpo()(model, paired(PAIRS))
    torch.manual_seed(1)
    expected, _ = dpo(reference=reference)(model, paired(PAIRS))
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert [module.training for module in model.modules()] == modes


def test_a_reference_that_would_change_is_refused():
    model = llama()
    with pytest.raises(ConfigError, match="reference has weights of the model that is trained"):
        dpo(reference=model)(model, paired(PAIRS))
    base = llama()
    adapted = get_peft_model(base, LORA).double()
    with pytest.raises(ConfigError, match="leave reference= out"):
        dpo(reference=base)(adapted, paired(PAIRS))
    base.lm_head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"trains 1 weights beside its adapters.*lm_head"):
        dpo()(adapted, paired(PAIRS))
    with pytest.raises(ConfigError, match=r"no reference.*reference_logps"):
        dpo()(model, paired(PAIRS))
    both = paired(with_column(model, PAIRS), keep=("reference",))
    with pytest.raises(ConfigError, match="Leave one out"):
        dpo(reference=llama())(model, both)


def test_arguments_and_batches_that_cannot_be_meant():
    for options in ({"beta": 0}, {"beta": "0.1"}, {"kind": "kto"}, {"reference": "gpt2"}):
        with pytest.raises(ConfigError):
            dpo(**options)
    flat = {name: column.flatten(0, 1) for name, column in paired(PAIRS).items()}
    for loss_fn, model in ((dpo(reference=llama()), llama()), (reward, classifier())):
        with pytest.raises(DataError, match=r"\(pairs, 2, tokens\).*preference_pairs"):
            loss_fn(model, flat)
    with pytest.raises(ModelError, match="num_labels=1"):
        reward(classifier(num_labels=2), paired(PAIRS))
    with pytest.raises(ModelError, match="loss of pairs"):
        margins({"logits": None}, {})
    kept = pickle.loads(pickle.dumps(dpo(0.2, kind="ipo")))
    assert kept == dpo(0.2, kind="ipo")


def classifier(num_labels=1):
    return llama(kind="LlamaForSequenceClassification", num_labels=num_labels)


def test_reward_is_the_formula_for_any_split():
    model = classifier()
    scores = torch.stack(
        [model(torch.tensor([ids])).logits[0, 0] for pair in PAIRS for ids in pair["input_ids"]]
    ).view(-1, 2)
    expected = gradient_of(model, -logsigmoid(scores[:, 0] - scores[:, 1]).mean())
    model.zero_grad()
    parts = [paired(part) for part in (PAIRS[:3], PAIRS[3:])]
    accumulate_gradients(model, parts, loss_fn=reward)
    assert apart(gradients(model), expected) < 1e-12
    assert check_accumulation(classifier().float(), paired(PAIRS), loss_fn=reward).is_exact


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_evaluation_of_margins_does_not_depend_on_the_batch_size(kind):
    model, reference = llama(), llama(seed=1)
    if kind == "dpo":
        loss_fn = dpo(0.5, reference=reference)
        with torch.no_grad():
            ratios = logps_of(model, PAIRS) - logps_of(reference, PAIRS)
        expected = (0.5 * (ratios[:, 0] - ratios[:, 1])).tolist()
    else:
        model, loss_fn = classifier(), reward
        with torch.no_grad():
            scores = [
                float(model(torch.tensor([ids])).logits) for p in PAIRS for ids in p["input_ids"]
            ]
        expected = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    for size in (1, 2, 5):
        loader = [paired(PAIRS[at : at + size]) for at in range(0, 5, size)]
        found = evaluate_loop(model, loader, preferred, loss_fn=loss_fn, decode=margins)
        assert found["accuracy"] == sum(m > 0 for m in expected) / 5
        assert found["margin"] == pytest.approx(sum(expected) / 5, rel=1e-6)
        assert found["loss"] == pytest.approx(
            float(-logsigmoid(torch.tensor(expected)).mean()), rel=1e-6
        )


def train(folder, reference, **options):
    model = gpt2(resid_pdrop=0.1)
    torch.manual_seed(7)
    loader = [paired(PAIRS[at : at + 2]) for at in range(0, 5, 2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return train_loop(
        model,
        loader,
        optimizer,
        num_epochs=2,
        loss_fn=dpo(reference=reference),
        checkpoint_dir=folder,
        checkpoint_every=1,
        progress_bar=False,
        **options,
    )


def stop(step):
    if step.index == 4:
        raise InterruptedError


def interrupted(folder, reference):
    with pytest.raises(InterruptedError):
        train(folder, reference, on_step=stop)


def test_a_run_with_a_reference_is_resumed_exactly_and_tells_another(tmp_path, caplog):
    caplog.set_level(logging.INFO, "manualloop")
    reference = gpt2(resid_pdrop=0.5)
    numbers = [weight.detach().clone() for weight in reference.parameters()]
    whole = train(tmp_path / "whole", reference).state.model
    interrupted(tmp_path / "same", gpt2(resid_pdrop=0.5))
    caplog.clear()
    resumed = train(tmp_path / "same", gpt2(resid_pdrop=0.5)).state.model
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any("models of" in line or "not bit-exact" in line for line in caplog.messages)
    assert all(map(torch.equal, numbers, reference.parameters()))
    caplog.clear()
    train(tmp_path / "same", gpt2(resid_pdrop=0.5))  # the same command again: it is finished
    other = gpt2(resid_pdrop=0.5)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match=r"models of loss_fn.*reference: GPT2LMHeadModel"):
        train(tmp_path / "same", other)
    interrupted(tmp_path / "other", reference)
    train(tmp_path / "other", other)
    assert any("exact, because models of loss_fn: reference" in line for line in caplog.messages)


def test_another_column_is_told_when_a_run_is_resumed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "manualloop")

    def train(reference, folder, **options):
        model, data = gpt2(), Dataset.from_list(with_column(reference, PAIRS))
        keep = {"keep": ("reference",), "batch_size": 2}
        loaders = prepare_dataloaders({"train": data}, tiny_tokenizer(), model=model, **keep)
        options = {"num_epochs": 1, "checkpoint_every": 1, "progress_bar": False, **options}
        return train_loop(
            model, loaders["train"], loss_fn=dpo(), checkpoint_dir=tmp_path / folder, **options
        )

    def stop(step):
        if step.index == 2:
            raise InterruptedError

    whole = train(llama(seed=1), "whole").state.model
    ends = {}
    for seed in (1, 2):
        with pytest.raises(InterruptedError):
            train(llama(seed=1), f"resumed {seed}", on_step=stop)
        caplog.clear()
        ends[seed] = train(llama(seed=seed), f"resumed {seed}").state.model
        told = [line for line in caplog.messages if "columns that loss_fn reads" in line]
        assert len(told) == (seed == 2), told
    assert all(map(torch.equal, whole.parameters(), ends[1].parameters()))
    with pytest.raises(CheckpointError, match="columns that loss_fn reads"):
        train(llama(seed=3), "whole")


def lora(**options):
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], **options}
    base = llama(initializer_range=0.3).float()
    return get_peft_model(base, LoraConfig(**config)).double()


@pytest.mark.parametrize("options", [{"init_lora_weights": False}, {"init_lora_weights": "pissa"}])
def test_adapters_that_change_the_model_already_are_no_reference(options, tmp_path):
    """Those that were trained before, and those whose base was changed with them (PiSSA)."""
    model, batch = lora(**options), paired(PAIRS)
    before = copy.deepcopy(model.state_dict())
    run = {"num_epochs": 1, "progress_bar": False}
    with pytest.raises(ModelError, match="change the model before the first update") as error:
        train_loop(model, [batch], loss_fn=dpo(1.0), **run)
    assert all(torch.equal(before[key], weight) for key, weight in model.state_dict().items())
    text = str(error.value)
    names = {"model": model, "dpo": dpo, "reference_logps": reference_logps, "rows": PAIRS}
    line = text[text.index("import copy") : text.index("; or keep the column")]
    exec(line.replace("; dpo", "; loss_fn = dpo"), names)
    result = train_loop(model, [batch], loss_fn=names["loss_fn"], **run)
    assert result.history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    line = text[text.index("with model.disable_adapter") :].removesuffix(".")
    exec(line, names)
    columns = [pair | {"reference": c} for pair, c in zip(PAIRS, names["column"], strict=True)]
    train_loop(model, [paired(columns, keep=("reference",))], loss_fn=dpo(1.0), **run)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_new_adapters_are_a_reference_also_of_a_run_that_is_resumed(options, dtype, tmp_path):
    model, batches = lora(**options).to(dtype), [paired(PAIRS)] * 3
    run = {"loss_fn": dpo(1.0), "progress_bar": False, "checkpoint_dir": tmp_path}
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=5.0)
    train_loop(model, batches, optimizer, num_epochs=1, **run)
    again = lora(**options).to(dtype)
    optimizer = torch.optim.SGD([w for w in again.parameters() if w.requires_grad], lr=5.0)
    result = train_loop(again, batches, optimizer, num_epochs=2, **run)
    assert result.state.progress.num_steps == 6


def test_a_file_of_reference_logps_is_of_the_adapters_that_are_on(tmp_path, caplog):
    caplog.set_level(logging.INFO, "manualloop")
    path, model = tmp_path / "reference.json", lora(init_lora_weights=False)
    model.add_adapter("other", LORA)
    on = reference_logps(model, PAIRS, path=path)
    with model.disable_adapter():
        off = reference_logps(model, PAIRS, path=path)
        assert off == reference_logps(model, PAIRS) != on
    assert "as with other adapters: computed again" in caplog.text
    model.set_adapter("other")
    assert reference_logps(model, PAIRS, path=path) == reference_logps(model, PAIRS) != off
    model.set_adapter("default")
    assert reference_logps(model, PAIRS, path=path) == on
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    assert reference_logps(model, PAIRS, path=path) == reference_logps(model, PAIRS) != on
    caplog.clear()
    reference_logps(model, PAIRS, path=path)
    assert "read from" in caplog.text


def test_a_file_of_reference_logps_knows_every_weight(tmp_path):
    path, model = tmp_path / "reference.json", llama()
    reference_logps(model, PAIRS, path=path)
    model.get_input_embeddings().weight.data[7] += 0.5
    assert reference_logps(model, PAIRS, path=path) == reference_logps(model, PAIRS)


@pytest.mark.parametrize("sizes", [{"n_positions": 8}, {"vocab_size": 30}], ids=str)
def test_a_reference_without_room_for_the_tokens_is_refused(sizes):
    model, batch = gpt2(), paired(pairs_of(4, seed=3))
    assert batch["input_ids"].shape[-1] > 8
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=r"a batch that reference= gets.* GPT2LMHeadModel") as error:
        train_loop(
            model, [batch], loss_fn=dpo(reference=gpt2(**sizes)), max_steps=1, progress_bar=False
        )
    if "n_positions" in sizes:
        assert "preference_pairs(tokenizer, max_length=8)" in str(error.value)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    rows = {name: column.flatten(0, 1) for name, column in batch.items()}
    with pytest.raises(DataError, match="a batch that teacher= gets"):
        evaluate_loop(model, [rows], loss_fn=distil(gpt2(**sizes)))
