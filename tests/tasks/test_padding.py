"""Padding that changes what a model makes of a row: not made, or refused before any update."""

import copy
import re

import pytest
import torch
import transformers
from accelerate import Accelerator
from chat_styles import tokenizer_for
from datasets import Dataset
from helpers import messages, tiny_bert, tiny_tokenizer
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_language_models import (
    SIZES,
    VOCAB,
    gpt2,
    llama,
    needs_transformers_5,
    of_kind,
    padded,
    paired,
    pairs_of,
    rows_of,
)

from manualloop import (
    DataError,
    ModelError,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.strategy.accelerated import Accelerated
from manualloop.strategy.single import SingleDevice
from manualloop.tasks import (
    complete,
    distil,
    dpo,
    generated,
    lm_loss,
    margins,
    preference_pairs,
    preferred,
    reference_logps,
    reward,
    source_target,
)
from manualloop.tasks.padding import require_padding_unseen

PROMPTS = ["the sun", "2+2 is four. Café naïve don't ok! a b c x_y"] * 3
ANSWERS = {"chosen": [" is ok!", " four"] * 3, "rejected": [" no end? the sun is four", " no"] * 3}
TEXTS = {"prompt": PROMPTS, "completion": ANSWERS["chosen"]}


def left_tokenizer():
    tokenizer = tokenizer_for("zephyr")
    tokenizer.padding_side = "left"
    return tokenizer


def sharp(model):
    """The same model with weights as large as trained ones, so that positions matter."""
    for weight in model.parameters():
        weight.data *= 8
    return model.eval()


def absolute(tokenizer, **config):
    return sharp(gpt2(vocab_size=len(tokenizer), n_positions=128, **config))


def test_rows_of_texts_are_padded_on_the_right_and_that_is_told(caplog):
    tokenizer = left_tokenizer()
    model = absolute(tokenizer)
    data = {"train": Dataset.from_dict(TEXTS), "validation": Dataset.from_dict(TEXTS)}
    scores = []
    for size in (1, 6):
        loaders = prepare_dataloaders(
            data, tokenizer, model=model, preprocess=complete(tokenizer), batch_size=size
        )
        scores.append(evaluate_loop(model, loaders["validation"], "perplexity")["loss"])
        scores.append(evaluate_loop(model, loaders["train"], loss_fn=lm_loss)["loss"])
    assert scores == pytest.approx(scores[:1] * 4, rel=1e-6)
    assert check_accumulation(model, next(iter(loaders["train"]))).is_exact
    assert tokenizer.padding_side == "left"
    (line,) = {line for line in messages(caplog) if "padded on the right" in line}
    assert line.startswith("train, validation: rows with labels are padded on the right, though")


def test_pairs_have_the_margin_of_the_reference_in_any_batch():
    tokenizer = left_tokenizer()
    model = absolute(tokenizer)
    pairs = preference_pairs(tokenizer)({"prompt": PROMPTS, **ANSWERS})
    column = reference_logps(model, Dataset.from_dict(pairs))
    data = {"validation": Dataset.from_dict({**pairs, "reference": column})}
    for size in (1, 4):
        loader = prepare_dataloaders(
            data, tokenizer, model=model, keep=("reference",), batch_size=size
        )["validation"]
        scores = evaluate_loop(model, loader, preferred, decode=margins, loss_fn=dpo(0.1))
        assert scores["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_an_encoder_decoder_gets_its_labels_on_the_right():
    tokenizer = left_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = sharp(transformers.T5ForConditionalGeneration(config).double())
    preprocess = source_target(tokenizer, "prompt", "completion")
    losses = [
        evaluate_loop(
            model,
            prepare_dataloaders(
                {"dev": Dataset.from_dict(TEXTS)},
                tokenizer, model=model, preprocess=preprocess, batch_size=size,
            )["dev"],
        )["loss"]
        for size in (1, 6)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_encoders_and_decoders_are_tried_with_their_labels(kind):
    sizes = {"vocab_size": VOCAB, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}
    sizes |= {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2} if kind == "T5" else {
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = sharp(getattr(transformers, f"{kind}ForConditionalGeneration")(config).double())
    batch = left_batch()
    batch["labels"] = torch.full((5, 4), -100)
    batch["labels"][:, :2] = 7
    if kind == "T5":  # counts distances
        accumulate_gradients(model, [batch])
        return
    with pytest.raises(DataError, match="BartForConditionalGeneration sees how far"):
        accumulate_gradients(model, [batch])


@needs_transformers_5
def test_prompts_alone_keep_their_side_and_are_continued():
    tokenizer = left_tokenizer()
    model = absolute(tokenizer)
    data = {"test": Dataset.from_dict(tokenizer(PROMPTS, add_special_tokens=False).data)}
    loader = prepare_dataloaders(data, tokenizer, model=model, batch_size=6)["test"]
    batch = next(iter(loader))
    assert not batch["attention_mask"][:, 0].all()

    def decode(outputs, batch, model):
        ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
        return tokenizer.batch_decode(ids[:, -3:])

    own = predict_loop(model, loader, decode=decode).predictions
    ours = predict_loop(model, loader, decode=generated(tokenizer, max_new_tokens=3)).predictions
    assert [text.strip() for text in own] == ours
    with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
        predict_loop(model, loader)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ABSOLUTE = {
    "GPT2": gpt2,
    "GPTNeo": lambda: of_kind(
        "GPTNeo", num_layers=1, num_heads=2, attention_types=[[["global"], 1]], intermediate_size=24
    ),
    "Bert": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**SIZES, is_decoder=True)
    ).double(),
    "MaskedBert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).double(),
    "XGLM": None,
    "CTRL": None,
}
RELATIVE = {
    "Llama": llama,
    "GPTNeoX": lambda: of_kind("GPTNeoX"),
    "Bloom": lambda: of_kind("Bloom", n_head=2, n_layer=1),
    "OPT": lambda: of_kind("OPT", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
    "Roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZES, max_position_embeddings=64)
    ).double(),
    "Mixtral": lambda: of_kind("Mixtral", num_local_experts=2),
}
ABSOLUTE = {name: make for name, make in ABSOLUTE.items() if make}


def left_batch():
    return padded(rows_of((9, 4, 12, 2, 7)), left=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ABSOLUTE)
def test_padding_on_the_left_is_refused_where_positions_see_it(name, dtype):
    model = sharp(ABSOLUTE[name]().to(dtype))
    before = copy.deepcopy(model.state_dict())
    batch = left_batch()
    batch["labels"][batch["labels"] != -100] = 7  # not its own: a masked model would copy
    with pytest.raises(DataError, match="numbers positions from the first column") as error:
        train_loop(model.train(), [batch], max_steps=1, progress_bar=False)
    assert all(torch.equal(before[key], weight) for key, weight in model.state_dict().items())
    with pytest.raises(DataError, match="padded on the left"):
        evaluate_loop(model, [left_batch()])
    (line,) = re.findall(r'tokenizer\.padding_side = "\w+"', str(error.value))
    tokenizer = tiny_tokenizer(padding_side="left")
    exec(line, {"tokenizer": tokenizer})
    assert tokenizer.padding_side == "right"
    right = padded(rows_of((9, 4, 12, 2, 7)))
    right["labels"][right["labels"] != -100] = 7
    train_loop(model, [right], max_steps=1, progress_bar=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RELATIVE)
def test_padding_on_the_left_is_left_alone_where_they_do_not(name, dtype):
    model = sharp(RELATIVE[name]().to(dtype))
    require_padding_unseen(model, left_batch(), left_batch())


@pytest.mark.parametrize("by", ["accelerate", "the model"])
def test_logits_may_have_more_digits_than_the_model_computes_with(by):
    model, strategy = of_kind("Llama", **DEEP).float(), SingleDevice("cpu")
    if by == "accelerate":
        strategy = Accelerated(Accelerator(cpu=True, mixed_precision="bf16"))
    else:
        model.bfloat16().register_forward_hook(lambda module, args, outputs: with_float32(outputs))
    evaluate_loop(model, [left_batch()], strategy=strategy)


DEEP = {"num_hidden_layers": 8, "initializer_range": 0.3}


def with_float32(outputs):
    outputs.logits = outputs.logits.float()
    return outputs


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_masks_may_be_of_any_kind(dtype):
    for batch, model in ((left_batch(), llama()), (rows_with_classes(), CLASSIFIERS["Llama"]())):
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
        model.config.pad_token_id = 0
        require_padding_unseen(sharp(model), batch, batch)
    empty = {name: column[..., :0] for name, column in left_batch().items()}
    require_padding_unseen(model, empty, empty)


def test_what_was_only_logged_is_refused_where_it_counts(caplog):
    model, batch = sharp(gpt2()), left_batch()
    for _ in range(2):
        require_padding_unseen(model, batch, batch, refuses=False)
    assert len([line for line in messages(caplog) if "sees how far" in line]) == 1
    with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
        require_padding_unseen(model, batch, batch)


def with_positions(model, batch):
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return model(**inputs, position_ids=positions).loss


def by_place(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mean()


def test_it_is_what_the_model_gets_from_the_loss_that_counts():
    model = sharp(gpt2())
    require_padding_unseen(model, left_batch(), left_batch(), with_positions)
    for loss_fn in (by_place, lm_loss, distil(llama())):
        with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
            require_padding_unseen(model, left_batch(), left_batch(), loss_fn)
    columns = {**left_batch(), "position_ids": (left_batch()["attention_mask"].cumsum(1) - 1)}
    columns["position_ids"].clamp_(min=0)
    require_padding_unseen(model, columns, columns)


def test_a_teacher_or_a_reference_that_sees_padding_is_refused():
    model = sharp(llama())
    with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
        require_padding_unseen(model, left_batch(), left_batch(), distil(sharp(gpt2())))
    batch = paired(pairs_of(3))
    pairs = {name: c.flatten(0, 1) for name, c in batch.items()}
    moved = {name: torch.empty_like(c) for name, c in pairs.items()}
    for row, mask in enumerate(pairs["attention_mask"]):
        shift = int((mask == 0).sum())
        for name, column in pairs.items():
            moved[name][row] = column[row].roll(shift)
    left = {name: c.view(batch[name].shape) for name, c in moved.items()}
    require_padding_unseen(model, left, left, dpo(reference=llama(seed=1)))
    with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
        require_padding_unseen(model, left, left, dpo(reference=sharp(gpt2())))


CLASSIFIERS = {
    "GPT2": lambda **pad: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, **pad)
    ),
    "Llama": lambda **pad: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**SIZES, "pad_token_id": None, **pad})
    ),
    "Qwen2": lambda **pad: transformers.Qwen2ForSequenceClassification(
        transformers.Qwen2Config(**{**SIZES, "pad_token_id": None, **pad})
    ),
}


def rows_with_classes(pad=0):
    batch = padded(rows_of((9, 4, 12, 2, 7)))
    batch["input_ids"][batch["attention_mask"] == 0] = pad
    return {**batch, "labels": torch.tensor([0, 1, 0, 1, 1])}


@pytest.mark.parametrize("own", [None, 9])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_that_does_not_know_the_pad_token_is_refused(name, own):
    model = sharp(CLASSIFIERS[name](num_labels=2, pad_token_id=own).double())
    with pytest.raises(
        ModelError, match=f"which is {own}, and the batch is padded with 0"
    ) as error:
        train_loop(model, [rows_with_classes()], max_steps=1, progress_bar=False)
    with pytest.raises(ModelError, match="pad_token_id"):
        evaluate_loop(model, [rows_with_classes()])
    (line,) = re.findall(r"model\.config\.pad_token_id = [\w.]*\w", str(error.value))
    exec(line, {"model": model})
    alone = [
        {n: c[k : k + 1, : 1 if n == "labels" else None] if c.ndim > 1 else c[k : k + 1]
         for n, c in rows_with_classes().items()}
        for k in range(5)
    ]  # fmt: skip
    together = evaluate_loop(model, [rows_with_classes()])["loss"]
    assert together == pytest.approx(evaluate_loop(model, alone)["loss"], rel=1e-6)


def test_rows_of_one_length_do_not_hide_it():
    batch = {"input_ids": torch.randint(3, VOCAB, (4, 6)), "labels": torch.tensor([0, 1, 1, 0])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = CLASSIFIERS["Llama"](num_labels=2)
    with pytest.raises(ModelError, match="names no pad token") as error:
        train_loop(model, [batch], max_steps=1, progress_bar=False)
    (line,) = re.findall(r"model\.config\.pad_token_id = [\w.]*\w", str(error.value))
    exec(line, {"model": model, "tokenizer": tiny_tokenizer()})
    train_loop(model, [batch], max_steps=1, progress_bar=False)


def prompted(model):
    """A classifier with a soft prompt of PEFT, which gives it embeddings in place of tokens."""
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    return get_peft_model(model, config).double()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_a_soft_prompt_hides_the_padding_from_a_classifier(name):
    model = prompted(sharp(CLASSIFIERS[name](num_labels=2, pad_token_id=0)))
    with pytest.raises(ModelError, match=r"soft prompt of PEFT.*batch_size=1"):
        train_loop(model, [rows_with_classes()], max_steps=1, progress_bar=False)
    of_one = [
        {**padded([row]), "labels": torch.tensor([number % 2])}
        for number, row in enumerate(rows_of((9, 4, 12)))
    ]
    train_loop(model, of_one, max_steps=1, progress_bar=False)
    prefix = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    other = get_peft_model(sharp(CLASSIFIERS[name](num_labels=2, pad_token_id=0)), prefix).double()
    batch, rows = rows_with_classes(), rows_of((9, 4, 12, 2, 7))
    alone = [{**padded([r]), "labels": batch["labels"][n : n + 1]} for n, r in enumerate(rows)]
    together = evaluate_loop(other, [batch])["loss"]
    assert together == pytest.approx(evaluate_loop(other, alone)["loss"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft
def test_a_soft_prompt_hides_it_from_a_reward_model_and_not_from_an_encoder(caplog):
    model = prompted(sharp(CLASSIFIERS["Llama"](num_labels=1, pad_token_id=0)))
    with pytest.raises(ModelError, match="soft prompt of PEFT"):
        train_loop(model, [paired(pairs_of(4))], loss_fn=reward, max_steps=1, progress_bar=False)
    encoder = prompted(tiny_bert(vocab_size=VOCAB))
    train_loop(encoder, [rows_with_classes()], max_steps=1, progress_bar=False)
    assert not any("padding" in line for line in messages(caplog))


def test_a_reward_model_that_does_not_know_the_pad_token_is_refused():
    tokenizer = tokenizer_for("zephyr")
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_labels": 1}
    data = Dataset.from_dict({"prompt": PROMPTS, **ANSWERS})
    for pad in (None, 9):
        config = transformers.LlamaConfig(**{**sizes, "pad_token_id": pad})
        model = sharp(transformers.LlamaForSequenceClassification(config).double())
        loader = prepare_dataloaders(
            data, tokenizer, model=model, preprocess=preference_pairs(tokenizer), batch_size=3
        )["train"]
        with pytest.raises(ModelError, match="pad_token_id"):
            train_loop(model, loader, loss_fn=reward, max_steps=1, progress_bar=False)
        model.config.pad_token_id = tokenizer.pad_token_id
        train_loop(model, loader, loss_fn=reward, max_steps=1, progress_bar=False)


def test_other_classifiers_are_left_alone():
    model = tiny_bert(num_labels=2, vocab_size=VOCAB)
    assert model.config.pad_token_id == 0
    train_loop(model, [rows_with_classes(pad=7)], max_steps=1, progress_bar=False)


def test_the_trial_leaves_no_trace():
    model = sharp(llama(attention_dropout=0.1)).train()
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    require_padding_unseen(model, left_batch(), left_batch(), lm_loss)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert all(weight.grad is None for weight in model.parameters())


def test_a_mask_of_another_length_is_refused():
    model, batch = llama(), padded(rows_of((5, 5)))
    for mask in (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)):
        wrong = {**batch, "attention_mask": mask}
        with pytest.raises(DataError, match=r"the shape \(2, 5\) and attention_mask"):
            train_loop(model, [wrong], max_steps=1, progress_bar=False)
        with pytest.raises(DataError, match="attention_mask"):
            evaluate_loop(model, [wrong])
    rows = {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[5, 6, 7], [8, 9]]}
    data = {"dev": Dataset.from_dict({**rows, "attention_mask": [[1, 1], [1]]})}
    tokenizer = tokenizer_for("zephyr")
    with pytest.raises(DataError, match="Row 0 of dev has 3 input_ids and an attention_mask of 2"):
        prepare_dataloaders(data, tokenizer, model=model)


class Plain(torch.nn.Module):
    """A model that is not of transformers, with positions of columns, and a dict as outputs."""

    def __init__(self, blind):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words, self.places = torch.nn.Embedding(VOCAB, 8), torch.nn.Embedding(32, 8)
        self.blind = blind

    def forward(self, input_ids, attention_mask, labels=None):
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        if self.blind:
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = (self.words(input_ids) + self.places(places)) @ self.words.weight.T
        return {"logits": logits, "loss": logits.square().mean()}


def test_models_of_ones_own_are_tried_as_well():
    accumulate_gradients(Plain(blind=True), [left_batch()])
    with pytest.raises(DataError, match="Plain sees how far"):
        accumulate_gradients(Plain(blind=False), [left_batch()])


class WithImage(Plain):
    """A model of texts beside images, whose width is that of the text."""

    def forward(self, input_ids, attention_mask, pixel_values, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        place = torch.linspace(0, 1, pixel_values.shape[-1])
        shift = (pixel_values * place).mean((1, 2, 3))[:, None, None] * torch.arange(VOCAB)
        return {**outputs, "logits": outputs["logits"] + shift}


def test_images_as_wide_as_the_text_are_left_whole():
    width = left_batch()["input_ids"].shape[1]
    batch = {**left_batch(), "pixel_values": torch.rand(5, 3, width, width)}
    accumulate_gradients(WithImage(blind=True), [batch])
    with pytest.raises(DataError, match="WithImage sees how far"):
        accumulate_gradients(WithImage(blind=False), [batch])


def test_boxes_of_tokens_are_cut_with_their_tokens(caplog):
    config = transformers.LayoutLMConfig(**SIZES, max_2d_position_embeddings=64, num_labels=3)
    model = sharp(transformers.LayoutLMForTokenClassification(config).double())
    batch = left_batch()
    batch["bbox"] = torch.randint(0, 30, (*batch["input_ids"].shape, 4)).sort(-1).values
    batch["labels"] = batch["labels"].clamp(max=2)
    with pytest.raises(DataError, match="LayoutLMForTokenClassification sees how far"):
        accumulate_gradients(model, [batch])
    assert not any("nothing tells" in line for line in messages(caplog))


def rotated(batch):
    """The batch with positions in three axes, as models of images have them."""
    places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**batch, "position_ids": places.expand(3, *places.shape).clone()}


class OfThreeAxes(Plain):
    def forward(self, input_ids, attention_mask, position_ids, labels=None):
        assert position_ids.shape == (3, *input_ids.shape)
        logits = (self.words(input_ids) + self.places(position_ids).sum(0)) @ self.words.weight.T
        return {"logits": logits, "loss": logits.square().mean()}


@pytest.mark.parametrize("lengths", [(9, 4, 12), (9, 4, 12, 2)], ids=["as many rows", "more"])
def test_positions_in_several_axes_are_cut_by_row_and_token(lengths, caplog):
    batch = rotated(padded(rows_of(lengths), left=True))
    accumulate_gradients(OfThreeAxes(blind=True), [batch])
    assert not any("nothing tells" in line for line in messages(caplog))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_effect_that_rounding_would_hide_is_seen(dtype):
    model, exact = sharp(gpt2()), sharp(gpt2())
    for one in (model, exact):
        one.transformer.wpe.weight.data *= 0.02
    model.to(dtype)
    batch, alone = left_batch(), rows_of((9, 4, 12, 2, 7))[3]
    ids = torch.tensor([alone["input_ids"]]) if isinstance(alone, dict) else torch.tensor([alone])
    with torch.no_grad():
        apart = exact(**batch).logits[3, -2:] - exact(ids).logits[0]
        effect = apart.abs().max() / exact(ids).logits.abs().max()
    assert 0.003 < effect < 0.06  # of which rounding in bfloat16 may make as much
    with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
        require_padding_unseen(model, batch, batch)
    assert all(weight.dtype == dtype for weight in model.parameters())
    strategy = Accelerated(Accelerator(cpu=True, mixed_precision="bf16"))
    with pytest.raises(DataError, match="GPT2LMHeadModel sees how far"):
        evaluate_loop(exact, [batch], strategy=strategy)
