"""Every function of the tasks, in a run that is interrupted inside an epoch and resumed.

``verify_resume`` starts three processes for each, so that most cases are run by `nox -s exhaustive`
alone.
"""

import multiprocessing
from functools import partial

import pytest
import torch
from bench import CONTEXT
from chat_styles import tokenizer_for
from datasets import Dataset, disable_progress_bars
from helpers import piece_tokenizer, questions, tagged_words, tiny_bert
from tiny_language_models import llama
from tiny_scenes import flipped_with_boxes, processor, scenes, tiny_segformer, tiny_vit, tiny_yolos
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from manualloop import prepare_dataloaders, train_loop, verify_resume
from manualloop import tasks as t

WORDS = (
    "the",
    "sun",
    "is",
    "four",
    "ok",
    "no",
    "a",
    "b",
    "c",
    "x_y",
    "end",
    "see",
    "don't",
    "caf\u00e9",
)


def texts(number=22, salt=0):
    return [
        " ".join(WORDS[(n * 5 + k + salt) % 14] for k in range(2 + n % 6)) for n in range(number)
    ]


def language(kind):
    """Tokenizer, model, loader and what train_loop is given for one of the functions of texts."""
    tokenizer = tokenizer_for("zephyr")
    tokenizer.add_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], special_tokens=True)
    model = llama(vocab_size=len(tokenizer), attention_dropout=0.1).float()
    columns = {"text": texts(), "prompt": texts(), "completion": texts(salt=3)}
    columns |= {"chosen": texts(salt=5), "rejected": texts(salt=7)}
    columns["messages"] = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one, other in zip(texts(), texts(salt=3), strict=True)
    ]
    more, options = {}, {"loss_fn": t.lm_loss}
    if kind == "cut":
        preprocess, options = t.cut(tokenizer, 24), {}
    elif kind in ("pack", "fill_in_middle"):
        preprocess = t.pack(tokenizer, 12)
        more = {"transform": t.fill_in_middle(tokenizer)} if kind == "fill_in_middle" else {}
    elif kind == "chat":
        preprocess, more = t.chat(tokenizer), {"max_tokens": 160, "pack": True}
    elif kind == "complete":
        preprocess, more = t.complete(tokenizer), {"group_by_length": True}
    elif kind == "distil":
        preprocess = t.complete(tokenizer)
        options = {"loss_fn": t.distil(llama(seed=1, vocab_size=len(tokenizer)).float())}
    elif kind == "source_target":
        preprocess, options = t.source_target(tokenizer, "prompt", "completion"), {}
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
        model = T5ForConditionalGeneration(config)
    else:
        preprocess = t.preference_pairs(tokenizer)
        options = {
            "loss_fn": t.dpo(0.3, reference=llama(seed=1, vocab_size=len(tokenizer)).float())
        }
        if kind == "reward":
            sizes = {"vocab_size": len(tokenizer), "num_labels": 1}
            model = llama(kind="LlamaForSequenceClassification", **sizes).float()
            model.config.pad_token_id = tokenizer.pad_token_id
            options = {"loss_fn": t.reward}
    return tokenizer, model, columns, {"preprocess": preprocess, **more}, options


def of_bert(kind):
    tokenizer = piece_tokenizer(mask_token="f")
    sizes = {"vocab_size": 32, "hidden_dropout_prob": 0.1}
    if kind == "tag_words":
        columns, preprocess = tagged_words(22), t.tag_words(tokenizer, max_length=12)
        model = tiny_bert(7, BertForTokenClassification, **sizes)
    elif kind == "answer_windows":
        columns, preprocess = questions(12), t.answer_windows(tokenizer, 48, 8)
        model = tiny_bert(kind=BertForQuestionAnswering, max_position_embeddings=64, **sizes)
    elif kind == "flatten_choices":
        choices = [[f"{one} {n % 3}" for one in "abc"] for n in range(22)]
        columns = {"q": ["ab fed"] * 22, "choices": choices, "label": [n % 3 for n in range(22)]}
        preprocess = t.flatten_choices(tokenizer, "q", "choices")
        model = tiny_bert(kind=BertForMultipleChoice, **sizes)
    else:
        columns, preprocess = {"text": ["ab fed c a b"] * 22}, t.cut(tokenizer, 12)
        model = tiny_bert(kind=BertForMaskedLM, **sizes)
    more = {"transform": t.mask_tokens(tokenizer)} if kind == "mask_tokens" else {}
    return tokenizer, model, columns, {"preprocess": preprocess, **more}, {}


def of_images(kind):
    size, names = {"height": 32, "width": 32}, ["image", "label"]
    own, model, options = processor("ViT", size={"height": 16, "width": 16}), tiny_vit(), {}
    transform = t.images()
    if kind == "images_and_masks":
        own, model, names = processor("Segformer", size=size), tiny_segformer(), ["image", "mask"]
        transform = t.images_and_masks()
    elif kind == "boxes":
        own, model = processor("Yolos", size=size), tiny_yolos()
        names, transform = ["image", "image_id", "objects"], t.boxes(augment=flipped_with_boxes)
        options = {"terms": t.detection_terms}
    return own, model, scenes(22).select_columns(names), {"transform": transform}, options


KINDS = {
    **dict.fromkeys(("tag_words", "answer_windows", "flatten_choices", "mask_tokens"), of_bert),
    **dict.fromkeys(("cut", "pack", "fill_in_middle", "chat", "complete"), language),
    **dict.fromkeys(("source_target", "distil", "dpo", "reward"), language),
    **dict.fromkeys(("images", "images_and_masks", "boxes"), of_images),
}
SAMPLE = ("fill_in_middle",)


def train(kind, **run):
    disable_progress_bars()
    torch.manual_seed(0)
    tokenizer, model, columns, prepared, options = KINDS[kind](kind)
    data = columns if isinstance(columns, Dataset) else Dataset.from_dict(columns)
    size = {} if "max_tokens" in prepared else {"batch_size": 2}
    loader = prepare_dataloaders(data, tokenizer, model=model, **prepared, **size)["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = {"num_epochs": 2, "gradient_accumulation_steps": 2, "log_every": 3}
    return train_loop(model, loader, optimizer, progress_bar=False, **steps, **options, **run)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in SAMPLE else pytest.param(kind, marks=pytest.mark.exhaustive)
        for kind in KINDS
    ],
)
def test_a_run_of_each_task_is_resumed_exactly(kind, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: CONTEXT)
    report = verify_resume(partial(train, kind), at=2)
    assert report.is_exact, report
    assert report.num_steps >= 4
