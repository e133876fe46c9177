"""A task is resolved once, and never holds for a batch or a model of another kind."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from heads import HEADS, build, head_id, make_batch
from helpers import bert_config, tiny_bert
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, BertForTokenClassification

import manualloop.tasks.task as task_module
from manualloop import (
    DataError,
    SingleDevice,
    TrainState,
    accumulate_gradients,
    apply_update,
    check_accumulation,
    count_items,
    evaluate_loop,
    predict_loop,
    train_steps,
)
from manualloop.batches import Kept
from manualloop.tasks.task import TASKS, count_window, infer_task, resolve_task


@pytest.mark.parametrize(
    ("task", "batch", "num_items"),
    [
        ("ForSequenceClassification", {"labels": torch.tensor([0, 1, -100])}, 2),
        ("ForSequenceClassification", {"labels": torch.zeros(3, 4)}, 12),
        ("ForTokenClassification", {"labels": torch.tensor([[1, -100], [2, 3]])}, 3),
        ("ForMaskedLM", {"labels": torch.tensor([[1, -100], [-100, -100]])}, 1),
        ("ForCausalLM", {"labels": torch.tensor([[1, 2, 3], [-100, 5, -100]])}, 3),
        ("LMHeadModel", {"labels": torch.tensor([[1, 2, 3], [-100, 5, -100]])}, 3),
        ("ForMultipleChoice", {"labels": torch.tensor([2, 0])}, 2),
        ("ForEntitySpanClassification", {"labels": torch.tensor([[1, -100], [2, 0]])}, 3),
        ("ForAudioFrameClassification", {"labels": torch.zeros(2, 5, 3).long()}, 10),
        ("Anything", {"x": torch.zeros(5, 2)}, 5),
        ("Anything", {"labels": torch.zeros(5, 1)}, 5),
        ("Anything", {"labels": [{"boxes": torch.zeros(2, 4)}] * 3, "x": torch.zeros(3, 2)}, 3),
    ],
)
def test_items_by_task(task, batch, num_items):
    model = type(f"Some{task}", (nn.Module,), {})()
    assert count_items(model, batch) == num_items


def test_an_encoder_decoder_is_not_shifted_and_shift_labels_are_taken():
    model = type("T5ForConditionalGeneration", (nn.Module,), {})()
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    labels = torch.tensor([[1, 2, -100]])
    assert count_items(model, {"labels": labels}) == 2
    model.config.is_encoder_decoder = False
    assert count_items(model, {"labels": labels}) == 1
    assert count_items(model, {"labels": labels, "shift_labels": torch.tensor([[1, 2, 3]])}) == 3


@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_a_known_task_is_the_one_that_would_be_found(head):
    model, batches = build(head), [make_batch(head, 3, seed) for seed in range(4)]
    known = resolve_task(model, batches[0])
    for batch in batches:
        model(**batch)  # models of transformers write their problem_type
        known = resolve_task(model, batch, known)
        fresh = resolve_task(model, batch)
        assert known.name == fresh.name == head[2] or "Bart" in head_id(head)
        assert known.count(batch) == fresh.count(batch)
    assert resolve_task(model, batches[0], known) is known


def head_without_a_shift(name):
    """A decoder in float64 whose labels may be shifted already, whatever its name is."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2}
    sizes |= {"decoder_ffn_dim": 8, "max_position_embeddings": 16, "dropout": 0.0}
    if name == "Flaubert":
        sizes = {"n_words": 20, "emb_dim": 8, "n_layers": 1, "n_heads": 2, "dropout": 0.0}
        sizes |= {"attention_dropout": 0.0, "max_position_embeddings": 16}
        return transformers.FlaubertWithLMHeadModel(transformers.FlaubertConfig(**sizes)).double()
    if name == "BertGeneration":
        sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "is_decoder": True}
        sizes |= {"num_attention_heads": 2, "intermediate_size": 8, "hidden_dropout_prob": 0.0}
        config = transformers.BertGenerationConfig(**sizes, attention_probs_dropout_prob=0.0)
        return transformers.BertGenerationDecoder(config).double()
    if name == "Mvp":
        sizes |= {"encoder_layers": 1, "encoder_ffn_dim": 8, "is_encoder_decoder": False}
    config = getattr(transformers, f"{name}Config")(**sizes, is_decoder=True)
    return getattr(transformers, f"{name}ForCausalLM")(config).double()


@pytest.mark.parametrize("name", ["TrOCR", "Mvp", "Bart", "Flaubert", "BertGeneration"])
def test_whether_a_head_shifts_its_labels_is_what_it_does(name):
    model, draw = head_without_a_shift(name), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (3, 6), generator=draw)
    batch = {"input_ids": ids, "labels": torch.randint(3, 20, (3, 6), generator=draw)}
    batch["labels"][1, 3:] = -100
    logits = model(**batch).logits
    first = {**batch, "labels": batch["labels"].index_fill(1, torch.tensor(0), -100)}
    is_shifted = torch.equal(model(**batch).loss, model(**first).loss)
    assert is_shifted is (name == "BertGeneration")
    kept = batch["labels"][:, 1:] if is_shifted else batch["labels"]
    logits = logits[:, :-1] if is_shifted else logits
    assert count_items(model, batch) == int((kept != -100).sum())
    is_right = (logits.argmax(-1) == kept)[kept != -100]
    scores = evaluate_loop(model, [batch], "accuracy")
    assert scores["accuracy"] == pytest.approx(float(is_right.double().mean()))
    assert "Any split is the same update" in str(check_accumulation(model, batch))


def test_a_subclass_of_ones_own_shifts_as_its_base():
    class MineForCausalLM(transformers.TrOCRForCausalLM):
        def forward(self, **inputs):
            return super().forward(**inputs)

    assert infer_task(MineForCausalLM(head_without_a_shift("TrOCR").config)) == "masked_lm"


KINDS = {
    "classes": {"labels": torch.tensor([0, 1, -100])},
    "values": {"labels": torch.tensor([0.5, 1.5, 2.5])},
    "column": {"labels": torch.tensor([[0.5], [1.5]])},
    "rows of values": {"labels": torch.zeros(2, 4)},
    "tokens": {"labels": torch.tensor([[1, -100, 2], [3, -100, -100]])},
    "single tokens": {"labels": torch.tensor([[1], [-100]])},
    "no labels": {"x": torch.zeros(5, 2)},
    "labels of another type": {"labels": ["a", "b"], "x": torch.zeros(2, 2)},
    "positions": {
        "input_ids": torch.zeros(2, 4),
        "start_positions": torch.tensor([1, 4]),
        "end_positions": torch.tensor([1, 2]),
    },
    "list": [torch.zeros(3, 2), torch.zeros(3)],
    "tensor": torch.zeros(4, 2),
}
MODELS = {
    "any": lambda: nn.Linear(1, 1),
    "classifier": tiny_bert,
    "regression": lambda: tiny_bert(1),
    "chosen": lambda: tiny_bert(4, problem_type="multi_label_classification"),
    "tokens": lambda: tiny_bert(kind=BertForTokenClassification),
    "answers": lambda: type("SomeForQuestionAnswering", (nn.Linear,), {})(1, 1),
}


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_no_batch_is_counted_by_the_rule_of_another_kind(model, first):
    model = MODELS[model]()
    known = resolve_task(model, KINDS[first])
    for later, batch in KINDS.items():
        task, fresh = resolve_task(model, batch, known), resolve_task(model, batch)
        assert task.count(batch) == fresh.count(batch), later
        labels = batch.get("labels") if isinstance(batch, dict) else None
        if isinstance(labels, torch.Tensor):
            assert task.name == fresh.name == infer_task(model, labels), later


def test_a_batch_without_labels_predicts_by_those_that_had_some():
    known = resolve_task(nn.Linear(1, 1), KINDS["values"])
    task = resolve_task(known.model, KINDS["no labels"], known)
    assert (task.name, task.count(KINDS["no labels"])) == ("regression", (5,))


def test_another_model_and_another_problem_type_are_looked_at_anew():
    model, batch = tiny_bert(3), {"labels": torch.zeros(2, 3)}
    known = resolve_task(model, batch)
    assert resolve_task(copy.deepcopy(model), batch, known) is not known
    model.config.problem_type = "regression"
    assert resolve_task(model, batch, known).name == "regression"


def test_labels_of_one_column_are_classes_to_a_classifier():
    """Of labels (rows, 1) the head makes a classification, which their shape alone does not say."""
    model = tiny_bert(3)
    batch = {"input_ids": torch.tensor([[4], [5]]), "labels": torch.tensor([[0], [2]])}
    known = resolve_task(model, batch)
    assert known.name == "single_label_classification"
    model(**batch)  # which writes the problem type into the config
    assert model.config.problem_type == known.name
    assert resolve_task(model, batch, known).name == "single_label_classification"
    assert predict_loop(tiny_bert(3), [batch]).scores is not None


def wrapped(model, how):
    if how == "compiled":
        return torch.compile(model, backend="eager")
    if how == "DataParallel":
        return nn.DataParallel(model)
    if how == "adapters":
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft
@pytest.mark.parametrize("how", ["bare", "compiled", "DataParallel", "adapters"])
@pytest.mark.parametrize("kind", ["tokens", "no labels", "rows of values"])
def test_wrappers_hide_nothing(how, kind):
    bare = tiny_bert(4)
    task = resolve_task(wrapped(copy.deepcopy(bare), how), KINDS[kind])
    expected = resolve_task(bare, KINDS[kind])
    assert (task.name, task.count(KINDS[kind])) == (expected.name, expected.count(KINDS[kind]))


def test_a_wrapper_of_data_parallelism_hides_nothing(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny_bert(1))
        batch = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([0])}
        known = resolve_task(model, batch)
        assert known.name == "regression"
        model(**batch)
        assert resolve_task(model, batch, known).name == "regression"
        (prediction,) = predict_loop(model, [batch], strategy=SingleDevice()).predictions
        model.eval()
        assert prediction == model(**batch).logits.item()
    finally:
        torch.distributed.destroy_process_group()


def test_a_task_travels_and_is_not_shared_by_copies():
    model, batch = tiny_bert(), {"labels": torch.tensor([0, 1])}
    task = resolve_task(model, batch)
    again = pickle.loads(pickle.dumps(task))
    assert again.count(batch) == task.count(batch)
    assert resolve_task(model, batch, copy.deepcopy(task)) is not task  # it is of another model


def test_every_rule_predicts_one_for_each_row():
    for name, rules in TASKS.items():
        assert len(rules.predict(torch.zeros(3, 1))) == 3, name


# In a run -----------------------------------------------------------------------------------------


class Line(nn.Module):
    """A linear layer whose loss is the mean over items that the labels show."""

    def __init__(self, width=2):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, width, dtype=torch.float64)

    def forward(self, x, labels):
        logits = self.linear(x)
        if labels.is_floating_point():
            loss = F.mse_loss(logits, labels)
        else:
            loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def draw(num_rows, *, classes):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 3, dtype=torch.float64, generator=generator)
    if not classes:
        labels = torch.randn(num_rows, 2, dtype=torch.float64, generator=generator)
        labels[0, 0] = -100.0  # a value like any other
        return {"x": x, "labels": labels}
    labels = torch.randint(2, (num_rows,), generator=generator)
    labels[0] = -100
    return {"x": x, "labels": labels}


MIXED = [draw(number, classes=number % 2 == 0) for number in (4, 5, 6, 3, 2, 8)]


def written_out(model, window):
    """The gradient step of a window of both kinds of batches, by hand."""
    sums, num_items = [], 0
    for batch in window:
        labels, logits = batch["labels"], model.linear(batch["x"])
        if labels.is_floating_point():
            sums.append(((logits - labels) ** 2).sum())
            num_items += labels.numel()
        else:
            sums.append(F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
            num_items += int((labels != -100).sum())
    (sum(sums) / num_items).backward()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_mixed_loader_trains_as_written_out(size):
    ours, theirs = Line(), Line()
    state = TrainState(ours, torch.optim.SGD(ours.parameters(), lr=0.1))
    for _ in train_steps(state, MIXED, num_epochs=2, gradient_accumulation_steps=size):
        pass
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for start in [*range(0, len(MIXED), size)] * 2:
        optimizer.zero_grad()
        written_out(theirs, MIXED[start : start + size])
        optimizer.step()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-14)


def count_calls(monkeypatch, module, name):
    calls, function = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_run_resolves_once_and_forgets_at_its_end(monkeypatch):
    model = Line()
    batches = [draw(4, classes=True)] * 6
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    resolved = count_calls(monkeypatch, task_module, "_task_of")
    steps = train_steps(
        state, batches, num_epochs=3, gradient_accumulation_steps=2, preflight=False
    )
    next(steps)
    assert state.task.model is model
    for _ in steps:
        pass
    assert len(resolved) == 1
    assert state.task is None
    assert "task" not in state.state_dict()


def test_a_run_that_is_left_or_fails_forgets_its_task():
    model = Line()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = train_steps(state, MIXED, num_epochs=1)
    next(steps)
    assert state.task is not None
    steps.close()
    assert state.task is None
    with pytest.raises(DataError):
        list(train_steps(state, [{"x": torch.zeros(2, 3)}], num_epochs=9))
    assert state.task is None


def test_a_head_that_is_replaced_between_two_runs_is_seen():
    """The config of the same model then says regression, and labels stay whole numbers."""
    model = tiny_bert(2, hidden_dropout_prob=0.0)
    batch = {"input_ids": torch.tensor([[4, 5], [6, 7], [8, 9]])}
    batch["labels"] = torch.tensor([0, 1, -100])
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (step,) = train_steps(state, [batch], num_epochs=1)
    assert step.num_items == 2
    model.classifier = nn.Linear(8, 1)
    model.num_labels = model.config.num_labels = 1
    model.config.problem_type = None
    batch["labels"] = torch.tensor([0.0, 1.0, -100.0])
    state.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (step,) = train_steps(state, [batch], num_epochs=2)
    assert step.num_items == 3


def test_two_runs_with_other_losses_know_nothing_of_each_other():
    model, batches = Line(), [draw(4, classes=True)] * 2

    def by_rows(model, batch):
        return model.linear(batch["x"]).square().mean(), len(batch["x"])

    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    items = []
    for epochs, loss_fn in enumerate((None, by_rows, None), start=1):
        steps = train_steps(
            state, batches, num_epochs=epochs, gradient_accumulation_steps=2, loss_fn=loss_fn
        )
        items += [step.num_items for step in steps]
    assert items == [6, 8, 6]


def test_a_model_that_the_loop_body_puts_into_the_state_is_looked_at():
    class CausalForCausalLM(Line):
        pass

    model = Line()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tokens = {"x": torch.zeros(2, 3, 3, dtype=torch.float64), "labels": torch.ones(2, 3).long()}
    tokens = {"x": tokens["x"].transpose(1, 2), "labels": tokens["labels"]}
    model.forward = lambda x, labels: {"loss": model.linear(x).mean()}
    steps = train_steps(state, [tokens] * 2, num_epochs=1, preflight=False)
    assert next(steps).num_items == 6
    causal = CausalForCausalLM()
    causal.linear = model.linear
    causal.forward = model.forward
    state.model = causal
    assert next(steps).num_items == 4  # the first token of a row is not predicted
    steps.close()


def test_the_parts_called_alone_keep_nothing():
    model = Line()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in MIXED:
        apply_update(state, [batch], SingleDevice())
        assert state.task is None
        alone = accumulate_gradients(model, [batch]).num_items
        assert alone == count_items(model, batch)


def test_a_window_is_counted_with_one_resolution_for_each_kind(monkeypatch):
    model = nn.Linear(1, 1)
    resolved = count_calls(monkeypatch, task_module, "_task_of")
    counted = count_window(model, [KINDS["classes"]] * 5)
    assert (counted.counts, counted.task.name) == ([(2,)] * 5, "single_label_classification")
    assert len(resolved) == 1


def test_a_batch_is_looked_at_for_what_its_columns_can_hold():
    plain = {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}
    told = {
        "attention_mask": (torch.ones(2, 3), "padding"),
        "position_ids": (torch.arange(3)[None], "documents"),
        "seq_idx": (torch.zeros(1, 3), "documents"),
        "cu_seq_lens_q": (torch.tensor([0, 3]), "documents"),
        "id": (Kept(["a", "b"]), "kept"),
    }
    model = nn.Linear(1, 1)
    task = known = resolve_task(model, plain)
    assert not task.looks
    assert resolve_task(model, dict(plain), task) is task
    for name, (column, look) in told.items():
        known = resolve_task(model, plain | {name: column}, known)  # of the kind of the one before
        assert (known.kind, known.looks) == (task.kind, {look})
    window = count_window(model, [plain, plain | {"id": told["id"][0]}, plain], task)
    assert window.looks == {"kept"}


@pytest.mark.parametrize("name", ["id", "attention_mask"])
def test_a_column_that_only_a_later_batch_has_is_seen(name):
    """Kept columns skip the model, and a mask that does not fit is refused, in any batch."""
    model = tiny_bert()
    plain = {"input_ids": torch.tensor([[4, 5], [6, 7]]), "labels": torch.tensor([0, 1])}
    column = Kept(["a", "b"]) if name == "id" else torch.ones(2, 3)
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = train_steps(state, [plain, plain, plain | {name: column}], num_epochs=1)
    next(steps), next(steps)
    if name == "id":
        assert next(steps).num_items == 2
    else:
        with pytest.raises(DataError, match="the mask does not tell"):
            next(steps)


# In an evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_labels", [True, False])
def test_an_evaluation_looks_at_the_model_once(monkeypatch, takes_labels):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x):
            return {"logits": self.linear(x)}

    model = Line() if takes_labels else Bare()
    signatures = count_calls(monkeypatch, inspect, "signature")
    resolved = count_calls(monkeypatch, task_module, "_task_of")
    batches = [draw(4, classes=True)] * 20
    for loop, metric in ((evaluate_loop, ["accuracy"]), (predict_loop, [])):
        signatures.clear()
        resolved.clear()
        loop(model, batches, *metric)
        own = [function for function, *_ in signatures if function == model.forward]
        assert (len(own), len(resolved)) == (1, 1)


@pytest.mark.parametrize("takes_any", [True, False])
def test_labels_skip_a_model_that_does_not_take_them(takes_any):
    seen = []

    class Named(nn.Module):
        def forward(self, x):
            seen.append({"x"})
            return {"logits": x}

    class Anything(nn.Module):
        def forward(self, **columns):
            seen.append(set(columns))
            return {"logits": columns["x"]}

    evaluate_loop(Anything() if takes_any else Named(), [draw(4, classes=True)] * 2, "accuracy")
    assert seen == [{"x", "labels"} if takes_any else {"x"}] * 2


def test_a_mixed_loader_is_scored_by_the_items_of_each_batch():
    model = Line()
    found = evaluate_loop(model, MIXED)["loss"]
    total, num_items = 0.0, 0
    with torch.no_grad():
        for batch in MIXED:
            own = count_items(model, batch)
            total += float(model(**batch)["loss"]) * own
            num_items += own
    assert found == total / num_items


def test_predictions_of_two_kinds_are_refused():
    with pytest.raises(DataError, match="batch 1 are those of a regression"):
        predict_loop(Line(), MIXED)
    own = predict_loop(
        Line(), MIXED[:1] + MIXED[2:3], postprocess=lambda outputs, batch: outputs["logits"][:, 0]
    )
    assert len(own) == 10


def test_labels_that_some_batches_lack_are_left_out_and_reported(caplog):
    class Values(nn.Module):
        def forward(self, x, labels=None):
            return {"logits": x[:, :1]}

    first = {"x": torch.arange(4.0)[:, None], "labels": torch.arange(4.0)}
    with caplog.at_level("INFO", logger="manualloop"):
        table = predict_loop(Values(), [first, {"x": torch.arange(4.0, 6.0)[:, None]}])
    assert table.predictions.tolist() == [0, 1, 2, 3, 4, 5]  # values, not the class of one column
    assert table.references is None
    assert "some batches of the loader have no labels" in caplog.text


def test_labels_of_the_second_batch_of_a_bert_are_counted_anew():
    model = BertForSequenceClassification(bert_config(num_labels=3))
    rows = [{"input_ids": torch.tensor([4, 5]), "labels": n % 3} for n in range(6)]
    loader = DataLoader(rows, batch_size=2)
    again = [evaluate_loop(model, loader, "accuracy") for _ in range(2)]
    assert again[0] == again[1]
    assert model.config.problem_type is None  # which the model had written at its first batch


def luke_of_spans():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 20, "pad_token_id": 0}
    entities = {"entity_vocab_size": 9, "entity_emb_size": 16, "num_labels": 3}
    config = transformers.LukeConfig(**sizes, **words, **entities)
    labels = torch.tensor([[0, 1, -100], [2, -100, -100], [1, 1, 2]])
    places = labels.clamp(min=0) + 1
    return transformers.LukeForEntitySpanClassification(config), {
        "input_ids": torch.randint(3, 50, (3, 6)),
        "entity_ids": places,
        "entity_position_ids": places[..., None].expand(3, 3, 4),
        "entity_start_positions": places,
        "entity_end_positions": places + 1,
        "labels": labels,
    }


def wav2vec2_of_frames():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    layers = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4], "num_feat_extract_layers": 1}
    config = transformers.Wav2Vec2Config(
        vocab_size=9,
        hidden_size=16,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        num_labels=3,
        **sizes,
        **layers,
    )
    labels = F.one_hot(torch.randint(0, 3, (3, 10)), 3)
    model = transformers.Wav2Vec2ForAudioFrameClassification(config)
    return model, {"input_values": torch.rand(3, 40), "labels": labels}


@pytest.mark.parametrize("make", [luke_of_spans, wav2vec2_of_frames])
def test_classifiers_of_parts_of_a_row_are_trained_and_scored_in_any_split(make):
    model, batch = make()
    model.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    loss = model(**batch).loss
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    rows = [{name: column[n : n + 1] for name, column in batch.items()} for n in range(3)]
    assert evaluate_loop(model, rows)["loss"] == pytest.approx(loss.item(), rel=1e-9)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for _ in train_steps(
        TrainState(model, optimizer), rows, gradient_accumulation_steps=3, max_steps=1
    ):
        pass
    model.zero_grad()
    model.eval()
    accumulate_gradients(model, rows)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    right = batch["labels"]
    if right.ndim == 2:  # of frames no metric of classes is told what the right ones are
        kept, best = right != -100, model(**batch).logits.argmax(-1)
        share = (best == right)[kept].double().mean().item()
        assert evaluate_loop(model, rows, "accuracy")["accuracy"] == pytest.approx(share)
