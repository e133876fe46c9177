"""Small things that take the place of what README and docs download, or call the reader's own.

Every Python block of a page runs as it stands (see test_docs.py). This file holds all that differs
from a reader's machine: what ``load_dataset`` and ``from_pretrained`` would fetch from a hub, and
files that a page calls "your own". Nothing here changes a name, an argument or a result of
``manualloop``.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from datasets import Dataset, DatasetDict
from helpers import bert_config
from PIL import Image
from tiny_scenes import processor, scenes, tiny, tiny_segformer, tiny_vit, tiny_yolos
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

LENGTH = 2048  # of positions, so that no page is cut off by a stand-in
FEWER = {  # of what would take minutes, and shows no more
    "num_steps=100": "num_steps=12",
    "max_steps=600": "max_steps=11",
    "n_trials=20": "n_trials=3",
    "range(5)": "range(2)",
    "StratifiedKFold(5": "StratifiedKFold(2",
}
WORDS = ["a", "good", "bad", "very", "dull", "fine", "movie", "plot", "was", "not", "the", "film"]


LINES = ["a very dull film", "not a bad plot but the acting was fine", "Anna was in Essen"]


# ---------------------------------------------------------------- from_pretrained

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
}
MORE = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer_of_bytes(name: str, **options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes, which knows every text; framed as BERT's or T5's, if that is named."""
    special = [*SPECIAL.values(), *MORE]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "bert" in name:  # to which a space is no part of a word
        words = pre_tokenizers.WhitespaceSplit()
        made.pre_tokenizer = pre_tokenizers.Sequence([words, made.pre_tokenizer])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    frames = {"bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"), "t5": ("$A <eos>", None)}
    for part, (single, pair) in frames.items():
        if part in name:
            numbers = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]", "<eos>")]
            made.post_processor = processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=numbers
            )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"model_max_length": LENGTH, **SPECIAL, **options}
    options["model_input_names"] = inputs if "bert-base" in name else ["input_ids", inputs[-1]]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _ids() -> dict[str, int]:
    tokenizer = tokenizer_of_bytes("")
    names = ("pad", "bos", "eos")
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}


def _bert(kind: str) -> Callable[..., Any]:
    sizes = {"vocab_size": len(tokenizer_of_bytes("")), "max_position_embeddings": LENGTH}

    def build(**config: Any) -> Any:
        return tiny(getattr(transformers, kind), bert_config(**{**sizes, **config}))

    return build


def _llama(kind: str) -> Callable[..., Any]:
    sizes = {
        "vocab_size": len(tokenizer_of_bytes("")),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
    }

    def build(**config: Any) -> Any:
        return tiny(
            getattr(transformers, kind), transformers.LlamaConfig(**{**sizes, **_ids(), **config})
        )

    return build


def _t5(**config: Any) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = _ids() | {"decoder_start_token_id": _ids()["pad_token_id"]}
    options = {"vocab_size": len(tokenizer_of_bytes("")), **sizes, **ids, **config}
    return tiny(transformers.T5ForConditionalGeneration, transformers.T5Config(**options))


def _yolos(ignore_mismatched_sizes: bool = False, **config: Any) -> Any:
    return tiny_yolos(**config)


MODELS: dict[str, Callable[..., Any]] = {
    "AutoModelForSequenceClassification": _bert("BertForSequenceClassification"),
    "AutoModelForTokenClassification": _bert("BertForTokenClassification"),
    "AutoModelForQuestionAnswering": _bert("BertForQuestionAnswering"),
    "AutoModelForMultipleChoice": _bert("BertForMultipleChoice"),
    "AutoModelForMaskedLM": _bert("BertForMaskedLM"),
    "BertForSequenceClassification": _bert("BertForSequenceClassification"),
    "BertForPreTraining": _bert("BertForPreTraining"),
    "AutoModelForCausalLM": _llama("LlamaForCausalLM"),
    "AutoModelForSeq2SeqLM": _t5,
    "AutoModelForImageClassification": tiny_vit,
    "AutoModelForSemanticSegmentation": tiny_segformer,
    "AutoModelForObjectDetection": _yolos,
}
OTHERS = {  # by what the name of the model contains
    ("AutoModelForSequenceClassification", "gpt2"): _llama("LlamaForSequenceClassification"),
}
PROCESSORS = {  # by what the name of the model contains: the kind, and the size of its images
    "vit": ("ViT", 16),
    "mit": ("Segformer", 32),
    "yolos": ("Yolos", 32),
}


def _processor(name: str, **options: Any) -> Any:
    kind, side = next(found for part, found in PROCESSORS.items() if part in name)
    size = {"height": side, "width": side}
    return processor(kind, **dict.fromkeys(("size", *options), size))


# ------------------------------------------------------------------- load_dataset


def sentences(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(number)]


def pairs(number: int = 12) -> Dataset:
    columns = {"sentence1": sentences(number, 1), "sentence2": sentences(number, 2)}
    labels = [row % 2 for row in range(number)]
    names = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    made = Dataset.from_dict({**columns, "label": labels, "idx": list(range(number))})
    return made.cast_column("label", names)


def _glue(task: str) -> DatasetDict:
    splits = {name: pairs() for name in ("train", "validation", "test")}
    hidden = datasets.Value("int64")
    test = splits["test"].cast_column("label", hidden)
    splits["test"] = test.map(lambda row: {"label": -1})
    return DatasetDict(splits)


def _squad() -> DatasetDict:
    context = "Anna went from Bern to Essen in May. It was a quiet year, and the trains were late."
    rows = [
        {
            "id": f"56be4db0acb8001400a502e{'cdef'[number]}",
            "question": question,
            "context": context,
            "answers": {"text": [answer], "answer_start": [context.index(answer)]},
        }
        for number, (question, answer) in enumerate(
            {"Who?": "Anna", "Where from?": "Bern", "Where to?": "Essen", "When?": "in May"}.items()
        )
    ]
    return DatasetDict({name: Dataset.from_list(rows) for name in ("train", "validation")})


def _wmt(pair: str) -> DatasetDict:
    rows = [{"translation": {"en": f"the {n}", "ro": f"{n} ul"}} for n in WORDS[:2]]
    return DatasetDict({name: Dataset.from_list(rows) for name in ("train", "validation")})


def _masks() -> DatasetDict:
    rows = scenes(8).select_columns(["image", "mask"]).rename_columns({"mask": "label"})
    return DatasetDict(train=rows.rename_column("image", "pixel_values"))


def _boxes() -> DatasetDict:
    rows = scenes(6).select_columns(["image", "image_id", "objects"])
    return DatasetDict(train=rows, test=rows)


DATASETS: dict[str, Callable[..., DatasetDict]] = {
    "glue": _glue,
    "nyu-mll/glue": _glue,
    "squad": _squad,
    "wmt16": _wmt,
    "segments/sidewalk-semantic": _masks,
    "cppe-5": _boxes,
}


# ----------------------------------------------------------------- the reader's files


def _chat(number: int) -> dict[str, Any]:
    ask, answer = {"role": "user", "content": f"what is {number}"}, f"it is {number}"
    return {"messages": [ask, {"role": "assistant", "content": answer}]}


def _row(number: int) -> dict[str, Any]:
    """A row with what any of the pages of language models reads from train.jsonl."""
    of_pairs = {"prompt": f"say {number} ", "chosen": "yes gladly", "rejected": "no"}
    asked = {"question": f"what is {number}?", "answer": f"it is {number}"}
    return {**_chat(number), **of_pairs, **asked, "text": " ".join(sentences(4, number))}


def _write_lines(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_images(folder: str) -> None:
    draw = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (Path(folder) / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(Path(folder) / split / name / f"{number}.png")


def _write_texts(folder: str) -> None:
    Path(folder).mkdir()
    lines = [" ".join(sentences(6, seed)) for seed in range(48)]
    Path(folder, "1.txt").write_text("\n".join(lines))


def _write_tags(folder: str) -> None:
    Path(folder).mkdir()
    kinds = ("PER", "LOC", "ORG", "MISC")
    tags = ["O", *(f"{place}-{kind}" for kind in kinds for place in "BI")]
    rows = [{"tokens": text.split(), "ner_tags": tags[: len(text.split())]} for text in LINES]
    for split in ("train", "validation"):
        _write_lines(f"{folder}/{split}.jsonl", rows)


def _write_choices(folder: str) -> None:
    Path(folder).mkdir()
    rows = [{"start": "She takes", "endings": ["the key.", "a Tuesday."], "label": 0}] * 4
    for split in ("train", "validation"):
        _write_lines(f"{folder}/{split}.jsonl", rows)


FILES: dict[str, Callable[[], None]] = {
    "train.jsonl": lambda: _write_lines("train.jsonl", [_row(n) for n in range(6)]),
    "validation.jsonl": lambda: _write_lines("validation.jsonl", [_row(n) for n in range(6, 9)]),
    "mine.jsonl": lambda: _write_lines("mine.jsonl", [_row(n) for n in range(40)]),
    "held_out.jsonl": lambda: _write_lines("held_out.jsonl", [_row(n) for n in range(40, 80)]),
    "mine/": lambda: _write_texts("mine"),
    "held_out/": lambda: _write_texts("held_out"),
    "pets": lambda: _write_images("pets"),
    "tagged": lambda: _write_tags("tagged"),
    "choices": lambda: _write_choices("choices"),
}


# --------------------------------------------------------------------------- in place


def stand_in(text: str, monkeypatch: Any) -> None:
    """Write the files that a page names, and replace what its blocks would download."""
    for name, write in FILES.items():
        if f'"{name}' in text:
            write()
    load = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").absolute())

    def load_dataset(path: str, *names: Any, **options: Any) -> Any:
        known = DATASETS.get(path)
        return known(*names, **options) if known else load(path, *names, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    builds = dict(MODELS) | {"AutoTokenizer": None, "AutoImageProcessor": _processor}
    for kind, build in builds.items():
        _replace(monkeypatch, kind, build)


def _replace(monkeypatch: Any, kind: str, build: Callable[..., Any] | None) -> None:
    load = getattr(transformers, kind).from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Any:
        if name is None or os.path.isdir(name):
            return load(name, **options)
        options.pop("dtype", None)
        if build is None:
            return tokenizer_of_bytes(name, **options)
        if kind == "AutoImageProcessor":
            return build(name, **options)
        other = next((b for (of, part), b in OTHERS.items() if of == kind and part in name), None)
        return (other or build)(**options)

    monkeypatch.setattr(
        getattr(transformers, kind), "from_pretrained", staticmethod(from_pretrained)
    )
