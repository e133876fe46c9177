"""Losses that are sums of means: any split is the same update, or is refused with the fix."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPConfig,
    CLIPModel,
    ElectraConfig,
    ElectraForPreTraining,
    HubertConfig,
    HubertForCTC,
    MixtralConfig,
    MixtralForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
)

from manualloop import (
    ConfigError,
    ModelError,
    TrainState,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
    train_loop,
    train_steps,
)
from manualloop.tasks import detection_terms
from manualloop.tasks.task import resolve_task


@pytest.fixture(autouse=True)
def float64():
    """The loss of detection makes tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def detection():
    config = YolosConfig(
        **SMALL, image_size=[16, 16], patch_size=8, num_detection_tokens=6, num_labels=2
    )
    model = YolosForObjectDetection(config)
    numbers = (1, 4, 2, 0, 1, 3)
    labels = [
        {"class_labels": torch.randint(2, (n,)), "boxes": 0.2 + 0.5 * torch.rand(n, 4)}
        for n in numbers
    ]
    return model, {"pixel_values": torch.rand(6, 3, 16, 16), "labels": labels}


def pretraining():
    model = BertForPreTraining(BertConfig(**SMALL, vocab_size=50))
    ids = torch.randint(3, 50, (6, 8))
    ignored = torch.rand(6, 8) < torch.linspace(0.2, 0.9, 6)[:, None]
    return model, {
        "input_ids": ids,
        "labels": ids.masked_fill(ignored, -100),
        "next_sentence_label": torch.tensor([0, 1, -100, 1, 0, -100]),
    }


def pretraining_terms(outputs, batch):
    """Written for a batch in which a term may have no item: its mean is 0/0, and is left out."""
    logits, labels = outputs.prediction_logits.flatten(0, 1), batch["labels"].flatten()
    pair = outputs.seq_relationship_logits
    of_rows = batch["next_sentence_label"]
    return [
        (F.cross_entropy(logits, labels), (labels != -100).sum()),
        (F.cross_entropy(pair, of_rows), int((of_rows != -100).sum())),
    ]


def segmentation(num_labels=3, ignored=255):
    config = SegformerConfig(
        num_labels=num_labels,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        semantic_loss_ignore_index=ignored,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    model = SegformerForSemanticSegmentation(config).eval()  # for its batch normalisation
    labels = torch.randint(0, max(num_labels, 2), (6, 16, 16))
    for row in range(6):
        labels[row, : 2 * row] = ignored
    return model, {"pixel_values": torch.randn(6, 3, 16, 16), "labels": labels}


def speech(config_class, model_class, reduction="mean"):
    small = {name: value for name, value in SMALL.items() if name != "attention_probs_dropout_prob"}
    config = config_class(
        **small,
        **dict.fromkeys(
            ("attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout",
             "layerdrop", "mask_time_prob", "hidden_dropout"), 0.0
        ),
        conv_dim=[8, 8],
        conv_stride=[4, 4],
        conv_kernel=[4, 4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        vocab_size=6,
        pad_token_id=0,
        ctc_loss_reduction=reduction,
    )  # fmt: skip
    lengths = torch.tensor([3, 1, 4, 2, 1, 5])
    labels = torch.randint(1, 6, (6, 5))
    labels = labels.masked_fill(torch.arange(5) >= lengths[:, None], -100)
    return model_class(config), {"input_values": torch.randn(6, 400), "labels": labels}


def split(batch, sizes):
    parts, start = [], 0
    for size in sizes:
        parts.append({name: column[start : start + size] for name, column in batch.items()})
        start += size
    return parts


def gradient(model):
    parameters = [p for p in model.parameters() if p.grad is not None]
    return nn.utils.parameters_to_vector([p.grad for p in parameters])


SPLITS = [(6,), (3, 3), (1, 4, 1), (2, 1, 1, 2)]
MEANS = {  # counted without terms
    "segmentation": segmentation,
    "segmentation, another index": lambda: segmentation(ignored=7),
    "segmentation of one class": lambda: segmentation(num_labels=1),
    "Wav2Vec2": lambda: speech(Wav2Vec2Config, Wav2Vec2ForCTC),
    "Hubert": lambda: speech(HubertConfig, HubertForCTC),
    "Electra": lambda: (
        ElectraForPreTraining(ElectraConfig(**SMALL, vocab_size=50, embedding_size=16)),
        {
            "input_ids": torch.randint(3, 50, (6, 8)),
            "attention_mask": (torch.arange(8) < torch.arange(3, 9)[:, None]).long(),
            "labels": torch.randint(0, 2, (6, 8)),
        },
    ),
}


@pytest.mark.parametrize("kind", MEANS)
def test_a_loss_that_is_one_mean_is_counted_as_it_averages(kind):
    model, batch = MEANS[kind]()
    # transformers computes some of these in float32.
    tolerance = 1e-10 if kind in ("segmentation", "segmentation, another index") else 3e-6
    model(**batch).loss.backward()
    expected, loss = gradient(model), model(**batch).loss.item()
    for sizes in SPLITS:
        model.zero_grad()
        update = accumulate_gradients(model, split(batch, sizes))
        difference = (gradient(model) - expected).abs().max() / expected.abs().max()
        assert difference < tolerance
        assert update.loss.item() == pytest.approx(loss, rel=tolerance)
        scored = evaluate_loop(model, split(batch, sizes))["loss"]
        assert scored == pytest.approx(loss, rel=tolerance)


SUMS = {
    "detection": (detection, lambda model: detection_terms),
    "detection, undeclared": (
        detection,
        lambda model: lambda outputs, batch: detection_terms(outputs, batch),
    ),
    "pretraining": (pretraining, lambda model: pretraining_terms),
}


@pytest.mark.parametrize("kind", SUMS)
def test_a_sum_of_means_is_the_same_update_for_any_split(kind):
    """Against what transformers computes of the one batch."""
    make, terms_of = SUMS[kind]
    model, batch = make()
    terms = terms_of(model)
    if kind == "detection, undeclared":
        assert not hasattr(terms, "items")
    model(**batch).loss.backward()
    expected, loss = gradient(model), model(**batch).loss.item()
    for sizes in SPLITS:
        model.zero_grad()
        update = accumulate_gradients(model, split(batch, sizes), terms=terms)
        torch.testing.assert_close(gradient(model), expected, rtol=1e-10, atol=1e-12)
        assert update.loss.item() == pytest.approx(loss, rel=1e-10)
        scored = evaluate_loop(model, split(batch, sizes), terms=terms)["loss"]
        assert scored == pytest.approx(loss, rel=1e-10)
    assert check_accumulation(model, batch, terms=terms).is_exact


@pytest.mark.parametrize("kind", ["detection", "pretraining"])
def test_training_in_windows_makes_the_steps_of_the_loop_written_by_hand(kind):
    make, terms_of = SUMS[kind]
    model, batch = make()
    twin = copy.deepcopy(model)
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = [
        float(step.loss)
        for step in train_steps(
            state, split(batch, (1, 2, 3)), num_epochs=3, gradient_accumulation_steps=3,
            terms=terms_of(model), max_grad_norm=1.0,
        )
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for loss in losses:
        optimizer.zero_grad()
        expected = twin.train()(**batch).loss
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_one_micro_batch_has_the_bits_of_the_sum():
    model, batch = pretraining()
    sum(mean for mean, _ in pretraining_terms(model(**batch), batch)).backward()
    expected = gradient(model)
    model.zero_grad()
    accumulate_gradients(model, [batch], terms=pretraining_terms)
    assert torch.equal(gradient(model), expected)


class Noisy(nn.Module):
    """Dropout, batch statistics, and items that depend on random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4))
        self.one, self.two = nn.Linear(8, 1), nn.Linear(8, 1)
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        hidden = self.body(x)
        return {"one": self.one(hidden), "two": self.two(hidden), "kept": torch.rand(len(x)) < 0.6}


def noisy_terms(outputs, batch):
    kept = outputs["kept"]
    return [
        (outputs["one"].square().mean(), len(kept)),
        (outputs["two"][kept].exp().mean(), kept.sum()),
    ]


def test_counting_ahead_leaves_no_trace():
    """Random numbers and batch statistics are those of a run that knew the items before."""
    model = Noisy()
    twin = copy.deepcopy(model)
    parts = [{"x": torch.randn(n, 3)} for n in (5, 2, 4)]
    torch.manual_seed(3)
    accumulate_gradients(model, parts, terms=noisy_terms)
    after = torch.rand(2)
    torch.manual_seed(3)
    found = [noisy_terms(twin(**part), part) for part in parts]
    totals = [sum(float(term[k][1]) for term in found) for k in (0, 1)]
    assert totals[1] > 0
    sum(mean * n / totals[k] for term in found for k, (mean, n) in enumerate(term)).backward()
    assert torch.equal(torch.rand(2), after)
    torch.testing.assert_close(gradient(model), gradient(twin), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-12, atol=0
    )
    assert model.num_calls == 3 + 2  # the first micro-batch is not counted apart


def test_items_that_are_declared_need_no_pass_to_count():
    model = Noisy().eval()
    parts = [{"x": torch.randn(n, 3)} for n in (5, 2, 4)]

    def terms(outputs, batch):
        return [(outputs["one"].mean(), torch.tensor(99)), (outputs["two"].mean(), 1)]

    terms.items = lambda batch: [len(batch["x"]), 1]
    accumulate_gradients(model, parts, terms=terms)
    assert model.num_calls == 3
    weight = model.one.bias.grad.clone()
    assert weight == pytest.approx(1.0)  # a mean over all rows, by the declared items
    terms.items = lambda batch: [len(batch["x"]), 2]
    with pytest.raises(ModelError, match="a mean over 1 items, and 2 were declared"):
        accumulate_gradients(model, parts, terms=terms)


def test_one_term_is_weighed_without_counting_ahead():
    model = Noisy().eval()
    parts = [{"x": torch.randn(n, 3)} for n in (5, 2, 4)]
    whole = torch.cat([part["x"] for part in parts])
    accumulate_gradients(
        model, parts, terms=lambda outputs, batch: [(outputs["one"].exp().mean(), len(batch["x"]))]
    )
    assert model.num_calls == 3
    found = model.one.weight.grad.clone()
    model.zero_grad()
    model(whole)["one"].exp().mean().backward()
    torch.testing.assert_close(found, model.one.weight.grad, rtol=1e-10, atol=1e-12)


WRONG = {
    "a dict": (lambda outputs, batch: {"a": 1}, "terms returned a dict with keys a"),
    "a pair": (lambda outputs, batch: (outputs["one"].mean(), 3), "terms returned a tuple of 2"),
    "None": (lambda outputs, batch: None, "terms returned None"),
    "nothing": (lambda outputs, batch: [], "terms returned a list of 0"),
    "a tensor": (lambda outputs, batch: outputs["one"].mean(), "terms returned a Tensor"),
    "no count": (lambda outputs, batch: [(outputs["one"].mean(), None)], "something is None"),
    "two losses": (
        lambda outputs, batch: [(outputs["one"].mean(), outputs["two"].mean())], "requires grad",
    ),
    "rows": (lambda outputs, batch: [(outputs["one"], 3)], "The loss is a Tensor of shape"),
    "negative": (lambda outputs, batch: [(outputs["one"].mean(), torch.tensor(-1))], "is -1"),
    "other terms": (
        lambda outputs, batch: [(outputs["one"].mean(), 1)] * (1 + (len(batch["x"]) == 2)),
        "other numbers of terms",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_are_no_terms_is_refused(kind):
    terms, found = WRONG[kind]
    parts = [{"x": torch.randn(n, 3)} for n in (5, 2)]
    model, steps = Noisy().eval(), []
    with pytest.raises(ModelError, match=found):
        train_loop(
            model, parts, None, None, num_epochs=1, gradient_accumulation_steps=2, terms=terms,
            on_step=steps.append, progress_bar=False,
        )  # fmt: skip
    assert not steps
    with pytest.raises(ModelError, match=found):
        if kind == "two losses":  # nothing requires grad in an evaluation
            accumulate_gradients(model, parts, terms=terms)
        evaluate_loop(model, parts, terms=terms)


def test_two_answers_are_refused():
    model, batch = pretraining()
    both = {"terms": pretraining_terms, "loss_fn": lambda model, batch: model(**batch).loss}
    found = "Give loss_fn or terms, not both"
    with pytest.raises(ConfigError, match=found):
        train_loop(model, [batch], num_epochs=1, **both)
    with pytest.raises(ConfigError, match=found):
        accumulate_gradients(model, [batch], **both)
    with pytest.raises(ConfigError, match=found):
        evaluate_loop(model, [batch], **both)
    with pytest.raises(ConfigError, match=found):
        check_accumulation(model, batch, **both)
    with pytest.raises(ConfigError, match="step_fn replaces the whole update"):
        train_loop(model, [batch], terms=pretraining_terms, step_fn=lambda *args: None)
    with pytest.raises(ConfigError, match="terms is a list"):
        train_loop(model, [batch], num_epochs=1, terms=[1])


OTHERWISE = {
    "detection": detection,
    "pretraining": pretraining,
    "sum of CTC": lambda: speech(Wav2Vec2Config, Wav2Vec2ForCTC, "sum"),
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_losses_that_are_no_mean_are_refused_with_the_line_that_runs(kind, caplog):
    model, batch = OTHERWISE[kind]()
    if kind == "pretraining":  # the line is for rows that all have a label
        batch["next_sentence_label"] = batch["next_sentence_label"].clamp(min=0)
    parts = split(batch, (2, 1, 3))
    steps = []
    found = f"The loss of {type(model).__name__} is no mean"
    with pytest.raises(ModelError, match=found) as error:
        train_loop(
            model, parts, None, None, num_epochs=1, gradient_accumulation_steps=2,
            on_step=steps.append, progress_bar=False,
        )  # fmt: skip
    assert not steps
    train_loop(model, parts, None, None, num_epochs=1, progress_bar=False)  # one batch an update
    evaluate_loop(model, parts)
    assert "the loss is the mean of the batches' means" in caplog.text
    line = re.search(r"with its items: (.*)\.$", str(error.value))[1]
    namespace = {"model": model}
    *others, fix = [part.strip() for part in re.split(r"; (?:or, [^,]*, )?", line)]
    for statement in others:
        if "ctc" not in statement:
            exec(statement, namespace)
    exec(fix, namespace)
    assert check_accumulation(model, batch, terms=namespace["terms"]).is_exact
    if kind == "sum of CTC":
        exec(others[0], namespace)
        accumulate_gradients(model, parts)


def test_rows_that_are_compared_are_refused_with_the_line_that_runs():
    text, vision = {**SMALL, "vocab_size": 20}, {**SMALL, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).double()
    batch = {"input_ids": torch.randint(3, 20, (4, 5)), "pixel_values": torch.rand(4, 3, 16, 16)}
    parts = [{**part, "return_loss": True} for part in split(batch, (2, 2))]
    with pytest.raises(ModelError, match="CLIPModel compares each row with the others") as error:
        accumulate_gradients(model, parts)
    accumulate_gradients(model, parts[:1])
    line = re.search(r"loss_fn=(.*)\.$", str(error.value))[1]
    assert accumulate_gradients(model, parts, loss_fn=eval(line)).num_items == 4


@pytest.mark.parametrize("balances", [True, False])
def test_a_loss_that_balances_experts_is_reported_once(balances, caplog):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=20, **sizes, **heads, output_router_logits=balances)
    model, ids = MixtralForCausalLM(config).float(), torch.randint(3, 20, (2, 6))
    batch = {"input_ids": ids, "labels": ids}
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with caplog.at_level("INFO", logger="manualloop"):
        for _ in train_steps(state, [batch] * 4, num_epochs=1, gradient_accumulation_steps=2):
            pass
    assert sum("balances the experts" in line for line in caplog.messages) == balances


class Renamed(YolosForObjectDetection):
    pass


def test_a_subclass_without_a_loss_of_its_own_is_seen_through():
    model, batch = detection()
    model.__class__ = Renamed
    assert "Renamed is no mean" in resolve_task(model, batch).objection
    mae = ViTMAEForPreTraining(ViTMAEConfig(**SMALL, image_size=16, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16))  # fmt: skip
    assert resolve_task(mae, {"pixel_values": torch.rand(2, 3, 16, 16)}).objection is None


def music():
    """A model that writes sound, two codebooks of tokens, to texts; its config has two of texts."""
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    written = {"vocab_size": 64, "num_codebooks": 2, "pad_token_id": 0, "bos_token_id": 1}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    sound = {"num_filters": 4, "upsampling_ratios": [2], "hidden_size": 8, "codebook_size": 64}
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(vocab_size=50, **t5).to_dict(),
        audio_encoder=transformers.EncodecConfig(**sound, num_lstm_layers=1).to_dict(),
        decoder=transformers.MusicgenDecoderConfig(**sizes, **written, **dropout).to_dict(),
    )
    model = transformers.MusicgenForConditionalGeneration(config)
    model.config.decoder.decoder_start_token_id = 1
    labels = torch.randint(1, 64, (6, 5, 2))
    labels[1, 1:, 0], labels[2, 3:] = 0, -100  # padding is left out by the model itself
    return model, {"input_ids": torch.randint(3, 50, (6, 4)), "labels": labels}


def codebook_terms(outputs, batch):
    labels = batch["labels"].masked_fill(batch["labels"] == 0, -100)
    logits = outputs.logits.view(len(labels), 2, -1, 64)
    return [
        (F.cross_entropy(logits[:, n].flatten(0, 1), labels[..., n].flatten()) / 2, number)
        for n, number in enumerate((labels != -100).sum((0, 1)).tolist())
    ]


def test_means_over_the_labels_of_codebooks_are_taken_apart_by_terms():
    model, batch = music()
    parts = split(batch, (2, 1, 3))
    train_loop(model, parts, None, None, num_epochs=1, progress_bar=False)  # one batch an update
    with pytest.raises(ModelError, match="means over the labels of each codebook"):
        accumulate_gradients(model, parts)
    found = sum(mean for mean, _ in codebook_terms(model(**batch), batch))
    torch.testing.assert_close(found, model(**batch).loss)
    assert check_accumulation(model, batch, terms=codebook_terms).is_exact
