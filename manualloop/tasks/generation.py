"""Translation, summarization and other texts that are written from texts.

``source_target`` turns two columns of text into what an encoder-decoder is trained on;
``generated`` lets a model of either kind write, in an evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from manualloop.batches import Kept, model_inputs
from manualloop.errors import ConfigError, DataError, ModelError
from manualloop.models import config_of, is_sharded, max_length, model_name, unwrap_model
from manualloop.notices import say
from manualloop.tasks.made import Made, Place, Rows, counted, place_in_batch
from manualloop.tasks.rendering import stops_of
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.texts import encode_texts, texts_of

_NUM_NEW = 128  # tokens written at most, where neither the user nor the model tells
_NUM_SHOWN = 3


def source_target(
    tokenizer: Any,
    source: str,
    target: str,
    prefix: str = "",
    max_length: int | None = 128,
    max_target_length: int | None = None,
) -> SourceTarget:
    """Return a ``preprocess`` that makes tokens of a source text, and labels of its target.

    It is for encoder-decoders such as T5, BART and Marian. The target is tokenized as such
    (``text_target=``), which matters where the tokenizer has two vocabularies. Labels are padded
    with -100 when batches are made. A text that is cut ends with the tokenizer's last special
    token all the same, as in transformers' scripts: the model learns to stop there. A line reports
    how many are.

    Args:
        tokenizer: Tokenizer of the model.
        source: Column of the texts that are read; ``"translation.en"`` is the entry "en" of the
            dicts in the column "translation".
        target: Column of the texts that are to be written. A split without it has no labels.
        prefix: Text put before each source, such as ``"summarize: "`` for T5.
        max_length: Number of tokens at which sources are cut; None cuts none.
        max_target_length: Number of tokens at which targets are cut; None uses ``max_length``.

    Returns:
        A function for ``prepare_dataloaders(preprocess=)``. Of a batch of rows it makes the columns
        ``input_ids``, ``attention_mask`` and ``labels``.
    """
    return SourceTarget(
        tokenizer, source, target, prefix, max_length, max_target_length or max_length
    )


@dataclass(frozen=True)
class SourceTarget:
    """What ``source_target`` returns: its arguments, and where the model's generation stops."""

    tokenizer: Any
    source: str
    target: str
    prefix: str
    max_length: int | None
    max_target_length: int | None
    known: frozenset[int] = frozenset()
    cut_call: ClassVar[str] = "source_target(tokenizer, ..., max_length={room})"

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return tokens and labels of a batch of rows."""
        return self.make(rows, place_in_batch).columns

    def make(self, rows: Rows, place: Place) -> Made:
        """Return tokens and labels, and how many texts were cut."""
        texts = [self.prefix + text for text in texts_of(rows, self.source, place)]
        columns, are_cut = encode_texts(self.tokenizer, texts, self.max_length)
        counts = Counter(rows=len(texts), sources=sum(are_cut))
        if self.target in rows or self.target.partition(".")[0] in rows:
            targets = texts_of(rows, self.target, place)
            made, are_cut = encode_texts(
                self.tokenizer, targets, self.max_target_length, are_targets=True
            )
            columns["labels"] = labels = made["input_ids"]
            found = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("eos", "sep"))
            ends = self.known.union(found)
            whole = (ids for ids, is_cut in zip(labels, are_cut, strict=True) if not is_cut)
            num_open = sum(ends.isdisjoint(ids[-2:]) for ids in whole)  # mBART's language is last
            counts.update(targets=sum(are_cut), labels=sum(map(len, labels)), open=num_open)
        return Made(columns, list(range(len(texts))), counts)

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return how many texts were cut, and how many labels are left."""
        lines = [
            f"{counted(counts['rows'], 'row')} with {counted(counts.get('labels', 0), 'label')}"
        ]
        if number := counts.get("sources"):
            lines.append(f"{counted(number, 'source')} cut at {self.max_length} tokens")
        if number := counts.get("targets"):
            lines.append(
                f"{counted(number, 'target')} cut at {self.max_target_length} tokens, where the "
                "model learns to stop: raise max_target_length=, or filter them out"
            )
        if number := counts.get("open"):
            lines.append(
                f"{counted(number, 'target')} without a token that ends a text, so that "
                f"the model never learns to stop: {self._end()}"
            )
        return lines

    def _end(self) -> str:
        """Return what makes targets end."""
        name, eos = f'"{self.target}"', getattr(self.tokenizer, "eos_token", None)
        if eos is None:
            return 'name one, tokenizer.eos_token = "</s>", and put it behind each target'
        call = f'dataset.map(lambda row: {{{name}: row[{name}] + "{eos}"}})'
        return f"put {eos!r} behind each" if "." in self.target else call

    def with_model(self, model: nn.Module) -> SourceTarget:
        """Return the function with the stop tokens of a model's generation.

        Raises:
            ConfigError: The model has no encoder.
        """
        if not _is_encoder_decoder(model):
            raise ConfigError(
                f"source_target makes rows for an encoder-decoder, and {model_name(model)} is none:"
                " it would have to write a label for each token that it reads. Use complete: "
                f"preprocess=complete(tokenizer, prompt={self.source!r}, "
                f"completion={self.target!r})."
            )
        return replace(self, known=stops_of(unwrap_model(model)))


def generated(
    tokenizer: Any,
    *,
    references: str | None = None,
    num_samples: int = _NUM_SHOWN,
    **generate_options: Any,
) -> Generated:
    """Return a ``decode`` with which an evaluation scores what the model writes.

    Encoder-decoders write a text for each row. Decoder-only models continue the tokens before a
    row's first label, which are padded on the left. The right texts are the labels, as the
    tokenizer decodes them; of a row with several parts with labels the first part. Both are without
    special tokens, and without space at the ends. The text of a row does not depend on the batch,
    except where two tokens are equally likely up to rounding.

    The most likely text is written, greedily or by beams, whatever the model's own settings say:
    ``do_sample=True`` makes the score random. The model's other settings for generation hold,
    unless they are given here. Nothing of the model is changed.

    Args:
        tokenizer: Tokenizer of the model.
        references: Column with the right texts, kept by ``prepare_dataloaders(keep=)``; None
            decodes the labels, which may have been cut.
        num_samples: Number of rows whose texts ``evaluate_loop`` logs.
        generate_options: Options of transformers' ``generate``, such as ``num_beams=4`` and
            ``max_new_tokens=64``. By default the model's own limit of tokens holds, or 128.

    Returns:
        A function for ``evaluate_loop(decode=)`` and ``predict_loop(decode=)``, which returns a
        text a row, and the right one beside it where there is one.

    Raises:
        ConfigError: An option asks for several texts a row, or counts the prompt.
    """
    for name, right in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if generate_options.get(name) not in (None, right):
            raise ConfigError(
                f"generated takes one text a row, and {name}={generate_options[name]!r} asks for "
                f"something else. Leave {name} out."
            )
    if generate_options.pop("max_length", None) is not None:
        raise ConfigError(
            "max_length counts the prompt where a model has no encoder, and the first token of the "
            "decoder where it has one. Give the number of tokens to write: "
            "generated(tokenizer, max_new_tokens=64)."
        )
    return Generated(tokenizer, generate_options, references, num_samples)


@dataclass(frozen=True)
class Generated:
    """What ``generated`` returns.

    Attributes:
        tokenizer: Tokenizer of the model.
        options: Options of ``generate``.
        references: Column with the right texts; None for the labels.
        shows: Number of rows whose texts an evaluation logs.
        uses_outputs: Whether it needs a forward pass before it is called.
    """

    tokenizer: Any
    options: Mapping[str, Any]
    references: str | None
    shows: int
    uses_outputs: ClassVar[bool] = False

    def __call__(
        self, outputs: Any, batch: Mapping[str, Any], model: nn.Module
    ) -> list[str] | tuple[list[str], list[str]]:
        """Return a text for each row, and the right ones if the batch has them."""
        model = unwrap_model(model, adapters=False)
        if not callable(getattr(model, "generate", None)):
            raise ModelError(
                f"{model_name(model)} cannot generate: it has no method generate. Evaluate a model "
                "of transformers, of an average the one inside: ema.module."
            )
        if is_sharded(model):
            raise ModelError(
                f"The weights of this {model_name(model)} are sharded over the ranks, which would "
                "have to write as many tokens as each other. Evaluate a whole model: load a "
                "checkpoint of the run, find_checkpoint(folder), in one process."
            )
        with_encoder = _is_encoder_decoder(model)
        if with_encoder:
            written = _translate(model, batch, self.tokenizer, self.options)
        else:
            written = _continue(model, batch, self.tokenizer, self.options)
        texts = self._decode(written)
        right = self._right_texts(batch, with_encoder)
        return texts if right is None else (texts, right)

    def _right_texts(self, batch: Mapping[str, Any], with_encoder: bool) -> list[str] | None:
        if self.references is not None:
            column = batch.get(self.references)
            if not isinstance(column, Kept):
                raise ConfigError(
                    f"generated takes the right texts from {self.references!r}, which the batches "
                    f"do not have. Keep it: prepare_dataloaders(..., keep=({self.references!r},))."
                )
            return list(column)
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return None
        parts = [row[row != IGNORE_INDEX] if with_encoder else _first_part(row) for row in labels]
        return self._decode(parts)

    def _decode(self, rows: Sequence[Tensor]) -> list[str]:
        ids = [row.tolist() for row in rows]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def _first_part(labels: Tensor) -> Tensor:
    """Return the first labels of a row that follow each other."""
    places = (labels != IGNORE_INDEX).nonzero().flatten()
    if not len(places):
        return labels[:0]
    start = int(places[0])
    ends = (labels[start:] == IGNORE_INDEX).nonzero().flatten()
    return labels[start : start + int(ends[0])] if len(ends) else labels[start:]


# What of a batch is no input of a generation, or belongs to each token of a prompt.
_NO_INPUTS = (
    *("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    *("shift_labels", "use_cache"),
)
_BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")


def _translate(
    model: Any, batch: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]
) -> list[Tensor]:
    """Return the tokens that an encoder-decoder writes for each row."""
    room = max_length(model)
    config, more = _settings(model, tokenizer, options, room and room - 1)
    ids = model.generate(**_inputs(model, batch, _NO_INPUTS), generation_config=config, **more)
    return _until_stop(ids[:, 1:], config)  # the first is no token of the text


def _until_stop(ids: Tensor, config: Any) -> list[Tensor]:
    """Return the tokens of each row before the one that ends the text; padding comes after it."""
    stops = torch.tensor(config.eos_token_id or [], dtype=ids.dtype)
    ids = ids.cpu()
    is_over = torch.isin(ids, stops).cumsum(1) > 0
    return [row[~over] for row, over in zip(ids, is_over, strict=True)]


def _inputs(model: Any, batch: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    return {
        name: column.to(model.device)
        for name, column in model_inputs(batch).items()
        if isinstance(column, Tensor) and name not in without
    }


def _continue(
    model: Any, batch: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]
) -> list[Tensor]:
    """Return the tokens that a decoder-only model writes after the prompt of each row."""
    prompts = _prompts(model, batch)
    longest = max(map(len, prompts))
    config, more = _settings(model, tokenizer, options, None)
    num_new, room = config.max_length - 1, max_length(model)
    if room is not None and longest + num_new > room:
        raise ConfigError(
            f"A prompt of {longest} tokens and {num_new} new ones are more than the {room} that "
            f"{model_name(model)} takes. Write fewer: generated(tokenizer, "
            f"max_new_tokens={max(room - longest, 1)}), or cut the prompts."
        )
    pad = config.pad_token_id
    others = _inputs(model, batch, (*_NO_INPUTS, *_BY_TOKEN))
    together = [list(range(len(prompts)))]
    if _counts_prompt(config) or _sees_padding(model, prompts, config, others):
        together = _of_one_length(prompts)
    written: dict[int, Tensor] = {}
    for rows in together:
        ids, mask = _pad_left([prompts[row] for row in rows], pad)
        config.max_length = ids.shape[1] + num_new
        inputs = {name: column[rows] for name, column in others.items()}
        found = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            **inputs,
            **more,
        )
        new = _until_stop(found[:, ids.shape[1] :], config)
        written |= zip(rows, new, strict=True)
    return [written[row] for row in range(len(prompts))]


def _prompts(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the tokens before the first label of each row, without padding.

    Raises:
        DataError: Nothing tells where a prompt ends.
    """
    ids, mask, labels = (batch.get(n) for n in ("input_ids", "attention_mask", "labels"))
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise DataError(
            f"{model_name(model)} continues the input_ids of a batch that are no padding, and the "
            "batch does not tell them: it has no attention_mask beside them. Prepare the rows with "
            "prepare_dataloaders(dataset, tokenizer), and without pack=True where they are "
            "evaluated by what the model writes."
        )
    prompts = []
    for row, tokens in enumerate(ids):
        is_prompt = mask[row] != 0
        if isinstance(labels, Tensor) and len(first := (labels[row] != IGNORE_INDEX).nonzero()):
            is_prompt = is_prompt & (torch.arange(len(tokens)) < int(first[0]))
        prompts.append(tokens[is_prompt])
        if not len(prompts[-1]):
            raise DataError(
                f"Row {row} of a batch has no prompt: its labels begin with its first token. "
                "Score what the model writes for rows with a prompt and an answer, such as "
                "preprocess=complete(tokenizer) or chat(tokenizer) makes them; score plain text "
                'with "perplexity".'
            )
    return prompts


def _of_one_length(prompts: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of the prompts of each length."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(row)
    return list(groups.values())


def _pad_left(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return prompts as the rows of a matrix that end together, and which tokens are theirs."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _counts_prompt(config: Any) -> bool:
    """Tell whether an option looks at the tokens of the prompt, padding included."""
    return getattr(config, "repetition_penalty", None) not in (None, 1.0) or any(
        getattr(config, name, None)
        for name in (
            *("no_repeat_ngram_size", "sequence_bias", "min_length", "forced_bos_token_id"),
            *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
        )
    )


def _sees_padding(
    model: Any, prompts: Sequence[Tensor], config: Any, others: Mapping[str, Any]
) -> bool:
    """Tell whether the next token of a prompt depends on how far it is padded on the left.

    Models that number positions by the mask do not; others number them from the first column.
    """
    lengths = [len(prompt) for prompt in prompts]
    row, width = lengths.index(min(lengths)), max(lengths)
    if lengths[row] == width:
        return False
    once = deepcopy(config)
    once.num_beams, once.do_sample, once.min_length, once.min_new_tokens = 1, False, None, None
    if once.max_new_tokens is not None:
        once.max_new_tokens = 1
    once.return_dict_in_generate = once.output_logits = True
    inputs = {name: column[[row]] for name, column in others.items()}
    logits = []
    for missing in (0, width - lengths[row]):
        ids, mask = _pad_left([prompts[row]], config.pad_token_id)
        ids = nn.functional.pad(ids, (missing, 0), value=config.pad_token_id)
        mask = nn.functional.pad(mask, (missing, 0))
        once.max_length = ids.shape[1] + 1
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=once,
            **inputs,
        )
        logits.append(made.logits[0].flatten().double())
    alone, padded = (row - row.mean() for row in logits)
    rounding = max(1e-3, 8 * torch.finfo(made.logits[0].dtype).eps)
    if bool((alone - padded).abs().max() <= rounding * alone.abs().max()):
        return False
    if model not in _TOLD:
        _TOLD.add(model)
        say(
            f"what {model_name(model)} writes depends on padding on the left: prompts are "
            "continued together only where they are of one length."
        )
    return True


_TOLD: WeakSet[nn.Module] = WeakSet()

# What only sampling heeds, and what makes transformers warn where nothing is sampled.
_OF_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h"),
    *("epsilon_cutoff", "eta_cutoff"),
)


def _settings(
    model: Any, tokenizer: Any, options: Mapping[str, Any], most: int | None
) -> tuple[Any, dict[str, Any]]:
    """Return a generation config of our own, and what of the options is none of its settings.

    Its ``max_length`` is one more than the number of new tokens: that of a prompt of one token.

    Args:
        model: The model, whose own config stays as it is.
        tokenizer: Tokenizer, which may know stop tokens that the model's config does not.
        options: Options of ``generate``.
        most: Most tokens that fit, where the number of a prompt's tokens is known.
    """
    config = deepcopy(model.generation_config)
    given: dict[str, Any] = {"do_sample": False, "num_return_sequences": 1}
    given |= {"return_dict_in_generate": False, **options}
    if not given["do_sample"]:
        for name in _OF_SAMPLING:
            if hasattr(config, name):
                setattr(config, name, None)
    stops = options.get("eos_token_id", config.eos_token_id)
    given["eos_token_id"] = list(_stop_tokens(stops, tokenizer, "eos_token_id" in options)) or None
    if "pad_token_id" not in options:
        pads = (config.pad_token_id, tokenizer.pad_token_id, *(given["eos_token_id"] or ()), 0)
        given["pad_token_id"] = next(token for token in pads if token is not None and token >= 0)
    num_new = given.pop("max_new_tokens", None) or config.max_new_tokens
    if num_new is None:
        own = config.max_length if _is_encoder_decoder(model) else None
        # 20 is what older versions of transformers give every model.
        num_new = own - 1 if own not in (None, 20) else min(_NUM_NEW, most or _NUM_NEW)
    if config.max_new_tokens is not None:
        config.max_new_tokens = num_new  # else transformers takes it from the model's config
    config.max_length = num_new + 1
    more = config.update(**given)
    if config.stop_strings is not None:
        more = {"tokenizer": tokenizer, **more}
    return config, more


def _stop_tokens(given: Any, tokenizer: Any, are_chosen: bool) -> Iterator[int]:
    """Yield the tokens that end a text: the user's, or the model's and that of the tokenizer."""
    tokens = [given] if isinstance(given, int) else list(given or ())
    yield from tokens
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None and own not in tokens and not are_chosen:
        yield own
