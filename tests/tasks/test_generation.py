"""Texts written from texts: rows as the scripts make them, and what a model writes row by row."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from chat_styles import tokenizer_for
from datasets import Dataset
from helpers import messages, sentence, tiny_tokenizer
from tiny_language_models import llama, needs_transformers_5
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from manualloop import (
    ConfigError,
    DataError,
    ModelError,
    check_accumulation,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.tasks import complete, generated, source_target

PAD, EOS, VOCAB = 0, 3, 16
CALLS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "long beams": {"num_beams": 2, "length_penalty": 2},
}


def tokenizer(**options):
    return tiny_tokenizer(eos_token="[SEP]", **options)


def build(kind, config):
    """A model in float64 that does not write the same to everything."""
    torch.manual_seed(3)
    model = kind(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.4)
    return model


def t5(vocabulary=VOCAB):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS}
    return build(T5ForConditionalGeneration, T5Config(vocab_size=vocabulary, **sizes, **ids))


BART = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16},
    **{"decoder_ffn_dim": 16, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2},
    **{"decoder_start_token_id": EOS, "max_position_embeddings": 40, "forced_eos_token_id": None},
}
DECODER = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = DECODER | {"intermediate_size": 16, "num_key_value_heads": 2, "eos_token_id": EOS}
OPT = DECODER | {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 40}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
WITH_ENCODER = {
    "T5": t5,
    "BART": lambda: build(BartForConditionalGeneration, BartConfig(**BART)),
    "Marian": lambda: build(MarianMTModel, MarianConfig(**BART)),
}
DECODERS = {
    "Llama": lambda: build(LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "GPT2": lambda: build(GPT2LMHeadModel, GPT2Config(**GPT2, eos_token_id=EOS)),
    "OPT": lambda: build(OPTForCausalLM, OPTConfig(**OPT, eos_token_id=EOS)),
    "BART": lambda: build(BartForCausalLM, BartConfig(**BART)),  # its positions begin at padding
}


def cases(models):
    """Every model once, greedily or by beams in turn; the rest is exhaustive."""
    for number, name in enumerate(models):
        for place, call in enumerate(CALLS):
            marks = () if place == number % 2 else (pytest.mark.exhaustive,)
            yield pytest.param(name, call, marks=marks, id=f"{name}-{call}")


def pairs(num_rows=7):
    """Texts of 1 to 7 words, and the same words backwards."""
    sources = [sentence(number) for number in range(num_rows)]
    targets = [" ".join(reversed(text.split())) for text in sources]
    return Dataset.from_dict({"source": sources, "target": targets})


def answers(num_rows=7):
    """Rows of a prompt and an answer, of which the answer has labels."""
    draw, rows = torch.Generator().manual_seed(0), []
    for number in range(num_rows):
        prompt = torch.randint(4, VOCAB, (1 + 3 * number % 8,), generator=draw).tolist()
        answer = [*torch.randint(4, VOCAB, (1 + number % 3,), generator=draw).tolist(), EOS]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def texts_alone(model, rows, encode, tok=None, **options):
    """What transformers' own ``generate`` writes for each row by itself."""
    model.eval()
    texts = []
    for row in rows:
        ids = torch.tensor([encode(row)])
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=6,
                eos_token_id=EOS,
                pad_token_id=PAD,
                **options,
            )[0]
        found = found[1:] if model.config.is_encoder_decoder else found[ids.shape[1] :]
        texts.append((tok or tokenizer()).decode(found, skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize(("name", "call"), [*cases(WITH_ENCODER)])
def test_an_encoder_decoder_writes_what_it_writes_for_the_row_alone(name, call):
    model, data, options = WITH_ENCODER[name](), pairs(), CALLS[call]
    data = {"validation": data}
    make = source_target(tokenizer(), "source", "target")
    decode = generated(tokenizer(), max_new_tokens=6, **options)
    expected = texts_alone(
        model, data["validation"], lambda row: tokenizer()(row["source"])["input_ids"], **options
    )
    assert len({*expected}) > 1
    for batch_size in (3, 7):
        loader = prepare_dataloaders(
            data, tokenizer(), model=model, preprocess=make, batch_size=batch_size
        )["validation"]
        found = predict_loop(model, loader, decode=decode)
        assert found.predictions == expected
        assert found.references == data["validation"]["target"]


@pytest.mark.parametrize(("name", "call"), [*cases(DECODERS)])
def test_a_decoder_continues_what_it_continues_for_the_row_alone(name, call):
    model, data, options = DECODERS[name](), answers(), CALLS[call]
    prompts = [row["labels"].count(-100) for row in data]
    expected = texts_alone(
        model,
        range(len(data)),
        lambda row: data[row]["input_ids"][: prompts[row]],
        **options,
    )
    assert len({*expected}) > 2
    right = [row["input_ids"][number:] for row, number in zip(data, prompts, strict=True)]
    decode = generated(tokenizer(), max_new_tokens=6, **options)
    for batch_size in (3, 7):
        loader = prepare_dataloaders({"dev": data}, tokenizer(), batch_size=batch_size)["dev"]
        found = predict_loop(model, loader, decode=decode)
        assert found.predictions == expected
        assert found.references == tokenizer().batch_decode(right, skip_special_tokens=True)


@needs_transformers_5  # before, rows of BART are continued alone, and nothing is told
def test_padding_that_a_model_sees_is_left_out_and_reported(caplog):
    for name, is_told in (("Llama", False), ("BART", True)):
        model = DECODERS[name]()
        loader = prepare_dataloaders({"dev": answers()}, tokenizer(), batch_size=7)["dev"]
        caplog.clear()
        for _ in range(2):
            predict_loop(model, loader, decode=generated(tokenizer(), max_new_tokens=2))
        told = [line for line in messages(caplog) if "depends on padding" in line]
        assert len(told) == is_told


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"min_length": 5}],
    ids=lambda it: next(iter(it)),
)
def test_options_that_look_at_the_prompt_do_not_see_padding(options):
    model, data = DECODERS["Llama"](), answers()
    prompts = [row["labels"].count(-100) for row in data]
    # EOS is the pad token, which the options would punish in padded prompts.
    same = tokenizer(pad_token="[SEP]")
    expected = texts_alone(
        model, range(7), lambda row: data[row]["input_ids"][: prompts[row]], same, **options
    )
    loader = prepare_dataloaders({"dev": data}, same, batch_size=7)["dev"]
    found = predict_loop(model, loader, decode=generated(same, max_new_tokens=6, **options))
    assert found.predictions == expected


def test_a_whole_evaluation_scores_texts_and_the_loss_in_one_call(caplog):
    model = t5()
    make = source_target(tokenizer(), "source", "target")
    loader = prepare_dataloaders(
        {"validation": pairs()}, tokenizer(), model=model, preprocess=make, batch_size=3
    )["validation"]
    decode = generated(tokenizer(), max_new_tokens=6, num_samples=2)
    scores = evaluate_loop(model, loader, ["chrf", "exact_match", "rouge"], decode=decode)
    assert scores["loss"] == evaluate_loop(model, loader)["loss"]
    found = predict_loop(model, loader, decode=decode)
    right = sum(a == b for a, b in zip(found.predictions, found.references, strict=True))
    assert scores["exact_match"] == pytest.approx(right / 7)
    shown = [line for line in messages(caplog) if "the model writes" in line]
    assert len(shown) == 2
    assert shown[1].startswith(f"row 1: the model writes {found.predictions[1]!r}")
    assert repr(found.references[1]) in shown[1]


def test_nothing_of_the_model_changes():
    model = DECODERS["Llama"]()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.train()
    before = copy.deepcopy(vars(model.generation_config)), copy.deepcopy(vars(model.config))
    names, state = set(vars(model)), torch.get_rng_state()
    loader = prepare_dataloaders({"dev": answers()}, tokenizer(), batch_size=3)["dev"]
    decode = generated(tokenizer(), max_new_tokens=4)
    first, second = (predict_loop(model, loader, decode=decode).predictions for _ in range(2))
    assert first == second  # nothing is drawn
    assert (vars(model.generation_config), vars(model.config)) == before
    assert set(vars(model)) == names
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_knows_no_stop_token_gets_that_of_the_tokenizer():
    model = DECODERS["Llama"]()
    expected = texts_alone(model, range(1), lambda row: answers()[0]["input_ids"][:1])
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    loader = prepare_dataloaders({"dev": answers(1)}, tokenizer())["dev"]
    found = predict_loop(model, loader, decode=generated(tokenizer(), max_new_tokens=6))
    assert found.predictions == expected


def test_texts_end_at_a_stop_token_that_is_no_special_token():
    model = DECODERS["Llama"]()
    plain = tokenizer()
    loader = prepare_dataloaders({"dev": answers()}, plain)["dev"]
    whole = predict_loop(model, loader, decode=generated(plain, max_new_tokens=6)).predictions
    stop = whole[-1].split()[1]
    token = plain.convert_tokens_to_ids(stop)
    decode = generated(plain, max_new_tokens=6, eos_token_id=[EOS, token])
    cut = predict_loop(model, loader, decode=decode).predictions
    assert cut == [text.split(stop)[0].strip() for text in whole]


@pytest.mark.parametrize("is_own", [True, False])
def test_texts_may_end_at_a_string(is_own):
    """Of the call, or of the model's own settings."""
    plain = tokenizer_for("zephyr")
    model = llama(vocab_size=len(plain), initializer_range=1.0)
    data = {
        "dev": Dataset.from_dict({"prompt": ["a b", "the", "is four"], "completion": ["c"] * 3})
    }
    loader = prepare_dataloaders(data, plain, preprocess=complete(plain), batch_size=3)["dev"]
    whole = predict_loop(model, loader, decode=generated(plain, max_new_tokens=9)).predictions
    stop = whole[-1][3:6]
    if is_own:
        model.generation_config.stop_strings = [stop]
    options = {} if is_own else {"stop_strings": [stop]}
    decode = generated(plain, max_new_tokens=9, **options)
    cut = predict_loop(model, loader, decode=decode).predictions
    assert stop in cut[-1] != whole[-1]
    assert all(text.startswith(short) for text, short in zip(whole, cut, strict=True))


def test_the_right_texts_may_be_kept_columns():
    model, data = t5(), {"validation": pairs(), "test": pairs().remove_columns("target")}
    make = source_target(tokenizer(), "source", "target", max_target_length=3)
    loaders = prepare_dataloaders(
        {"validation": data["validation"]},
        tokenizer(),
        model=model,
        preprocess=make,
        keep="target",
    )
    decode = generated(tokenizer(), references="target", max_new_tokens=3)
    found = predict_loop(model, loaders["validation"], decode=decode)
    assert found.references == data["validation"]["target"]
    cut = predict_loop(
        model, loaders["validation"], decode=generated(tokenizer(), max_new_tokens=3)
    )
    assert [len(text.split()) for text in cut.references] == [1] * 7
    loader = prepare_dataloaders(data["test"], tokenizer(), model=model, preprocess=make)["train"]
    with pytest.raises(ConfigError, match=r"keep=\('target',\)"):
        predict_loop(model, loader, decode=decode)


def test_rows_without_targets_are_predicted():
    model, data = t5(), pairs().remove_columns("target")
    make = source_target(tokenizer(), "source", "target")
    loader = prepare_dataloaders(
        {"test": data}, tokenizer(), model=model, preprocess=make, batch_size=3
    )["test"]
    found = predict_loop(model, loader, decode=generated(tokenizer(), max_new_tokens=6))
    assert found.references is None
    assert found.predictions == texts_alone(
        model, data, lambda row: tokenizer()(row["source"])["input_ids"]
    )


def test_what_cannot_be_continued_is_refused():
    model = DECODERS["GPT2"]()
    decode = generated(tokenizer(), max_new_tokens=4)
    plain = Dataset.from_list([{"input_ids": [4, 5, 3], "labels": [4, 5, 3]}])
    loader = prepare_dataloaders({"dev": plain}, tokenizer())["dev"]
    with pytest.raises(DataError, match="Row 0 of a batch has no prompt"):
        predict_loop(model, loader, decode=decode)
    ids = torch.tensor([[4, 5, 6, 3]])
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises((DataError, ModelError), match=r"no attention_mask|see each other"):
        predict_loop(model, [packed], decode=decode)
    loader = prepare_dataloaders({"dev": answers()}, tokenizer())["dev"]
    with pytest.raises(ConfigError, match=r"max_new_tokens=32\)") as error:
        predict_loop(model, loader, decode=generated(tokenizer()))
    assert "A prompt of 8 tokens and 128 new ones" in str(error.value)
    predict_loop(model, loader, decode=generated(tokenizer(), max_new_tokens=32))
    with pytest.raises(ModelError, match="cannot generate"):
        predict_loop(torch.nn.Linear(1, 1), loader, decode=decode)
    for options in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            generated(tokenizer(), **options)
    with pytest.raises(ConfigError, match="max_new_tokens=64"):
        generated(tokenizer(), max_length=20)


# ---------------------------------------------------------------------------- source_target


def script_rows(tok, rows, prefix, max_length, max_target_length):
    """The function of transformers' run_translation_no_trainer.py and of run_summarization."""
    made = tok([prefix + text for text in rows["source"]], max_length=max_length, truncation=True)
    right = tok(text_target=rows["target"], max_length=max_target_length, truncation=True)
    return {**made, "labels": right["input_ids"]}


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("limits", [(128, None), (4, 3), (3, 9)])
def test_rows_are_those_of_the_scripts(kind, limits):
    tok = tokenizer() if kind == "fast" else ByT5Tokenizer()
    make = source_target(tok, "source", "target", "a ", *limits)
    rows = pairs(40)[:]
    found = make(rows)
    assert found == script_rows(tok, rows, "a ", limits[0], limits[1] or limits[0])
    whole = tok(["a " + text for text in rows["source"]])["input_ids"]
    counts = make.make(rows, str).counts
    assert counts["sources"] == sum(len(ids) > limits[0] for ids in whole)
    assert counts["labels"] == sum(map(len, found["labels"]))
    assert pickle.loads(pickle.dumps(make))(rows) == found


def test_prepare_dataloaders_reports_cuts_and_refuses_a_model_without_an_encoder(caplog):
    make = source_target(tokenizer(), "source", "target", "", 6, 4)
    prepare_dataloaders(pairs(9), tokenizer(), model=t5(), preprocess=make)
    (line,) = [m for m in messages(caplog) if m.startswith("train: 9 rows with")]
    assert "cut at 6 tokens" in line
    assert "cut at 4 tokens, where the model learns to stop" in line
    with pytest.raises(ConfigError, match="Use complete"):
        prepare_dataloaders(pairs(), tokenizer(), model=DECODERS["Llama"](), preprocess=make)


def test_targets_without_an_end_are_reported_with_the_line_that_ends_them(caplog):
    tok = tokenizer_for("llama2")  # as GPT-2's, it puts nothing behind a text
    model = t5(len(tok))
    rows = Dataset.from_dict({"source": ["the sun", "four", "end"], "target": ["a b", "", "no"]})
    make = source_target(tok, "source", "target")
    prepare_dataloaders(rows, tok, model=model, preprocess=make)
    (line,) = [m for m in messages(caplog) if m.startswith("train: 3 rows with")]
    assert "3 targets without a token that ends a text" in line
    fixed = eval(line[line.index("dataset.map") :], {"dataset": rows})
    assert [ids[-1] for ids in make(fixed[:])["labels"]] == [tok.eos_token_id] * 3
    caplog.clear()
    prepare_dataloaders(fixed, tok, model=model, preprocess=make)
    assert not any("ends a text" in line for line in messages(caplog))


@pytest.mark.parametrize("behind", [[EOS], [EOS, 9], [7]], ids=["end", "language", "model's"])
def test_targets_with_an_end_are_not_reported(behind):
    def tok(text=None, text_target=None, **_):
        return {"input_ids": [[5, 6, *behind] for _ in text or text_target]}

    tok.eos_token_id = EOS
    make = source_target(tok, "source", "target", max_length=None)
    model = t5()
    model.generation_config.eos_token_id = [7]
    assert make.with_model(model).make(pairs(2)[:], str).counts["open"] == 0


def test_columns_of_dicts_are_named_by_a_dot():
    rows = {"translation": [{"en": "good movie", "de": "very good"}]}
    found = source_target(tokenizer(), "translation.en", "translation.de")(rows)
    flat = source_target(tokenizer(), "en", "de")({"en": ["good movie"], "de": ["very good"]})
    assert found == flat
    with pytest.raises(ConfigError, match="'fr' among translation"):
        source_target(tokenizer(), "fr", "translation.de")(rows)
    rows = {"translation": [{"en": "good", "de": None}]}
    with pytest.raises(DataError, match=r'lambda row: row\["translation"\]\["de"\] is not None'):
        source_target(tokenizer(), "translation.en", "translation.de")(rows)


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_training_is_exact(name):
    model = WITH_ENCODER[name]()
    loaders = prepare_dataloaders(
        pairs(11),
        tokenizer(),
        model=model,
        preprocess=source_target(tokenizer(), "source", "target"),
        batch_size=4,
    )
    batch = next(iter(loaders["train"]))
    assert (batch["labels"] == -100).any()
    assert check_accumulation(model, batch).gradient_difference < 1e-12
    train_loop(model, loaders["train"], num_epochs=1, progress_bar=False)


def test_a_model_without_an_encoder_is_refused():
    with pytest.raises(ConfigError, match="completion='target'"):
        source_target(tokenizer(), "source", "target").with_model(DECODERS["Llama"]())


def test_decode_finds_a_partial_of_itself():
    """As the trial before the first update calls it."""
    model, decode = t5(), generated(tokenizer(), max_new_tokens=2)
    loader = prepare_dataloaders(
        {"dev": pairs()},
        tokenizer(),
        model=model,
        preprocess=source_target(tokenizer(), "source", "target"),
    )["dev"]
    assert (
        predict_loop(model, loader, decode=partial(decode)).predictions
        == predict_loop(model, loader, decode=pickle.loads(pickle.dumps(decode))).predictions
    )
