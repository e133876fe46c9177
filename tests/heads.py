"""Tiny models of many architectures and heads, each with a batch whose rows hold unequal items."""

import torch
import transformers

VOCAB, LENGTH, CLASSES, CHOICES = 50, 12, 3, 2

# Every probability that a config of transformers gives dropout under.
NO_DROPOUT = dict.fromkeys(
    (
        "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout",
        "classifier_dropout_prob", "dropout", "dropout_rate", "embd_pdrop", "embedding_dropout",
        "hidden_dropout_prob", "mlp_dropout", "pooler_dropout", "qa_dropout", "resid_pdrop",
        "seq_classif_dropout", "summary_first_dropout",
    ),
    0.0,
)  # fmt: skip

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SIZES = {
    "Bert": BERT,
    "Roberta": BERT | {"pad_token_id": 0},
    "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "ModernBert": BERT
    | dict.fromkeys(("cls_token_id", "bos_token_id"), 1)
    | dict.fromkeys(("sep_token_id", "eos_token_id"), 2)
    | {"pad_token_id": 0},
    "Deberta": BERT | {"pad_token_id": 0},
    "DebertaV2": BERT | {"pad_token_id": 0},
    "Electra": BERT | {"embedding_size": 16},
    "Albert": BERT | {"embedding_size": 16},
    "Llama": BERT | {"num_key_value_heads": 2, "pad_token_id": 0},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "Qwen2": BERT | {"num_key_value_heads": 2, "pad_token_id": 0},
    "T5": {
        "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0,
    },
    "Bart": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    },
}  # fmt: skip

# Architecture, head, what differs from a plain classification.
HEADS = [
    ("Bert", "SequenceClassification", "single_label_classification"),
    ("Roberta", "SequenceClassification", "single_label_classification"),
    ("DistilBert", "SequenceClassification", "single_label_classification"),
    ("ModernBert", "SequenceClassification", "single_label_classification"),
    ("Deberta", "SequenceClassification", "single_label_classification"),
    ("DebertaV2", "SequenceClassification", "single_label_classification"),
    ("Electra", "SequenceClassification", "single_label_classification"),
    ("Albert", "SequenceClassification", "single_label_classification"),
    ("Llama", "SequenceClassification", "single_label_classification"),
    ("GPT2", "SequenceClassification", "single_label_classification"),
    ("T5", "SequenceClassification", "single_label_classification"),
    ("Bert", "SequenceClassification", "multi_label_classification"),
    ("Bert", "SequenceClassification", "regression"),
    ("Bert", "TokenClassification", "token_classification"),
    ("Llama", "TokenClassification", "token_classification"),
    ("ModernBert", "TokenClassification", "token_classification"),
    ("Bert", "MaskedLM", "masked_lm"),
    ("ModernBert", "MaskedLM", "masked_lm"),
    ("Llama", "CausalLM", "causal_lm"),
    ("GPT2", "LMHeadModel", "causal_lm"),
    ("Bart", "CausalLM", "causal_lm"),  # wants its labels shifted already
    ("Qwen2", "CausalLM", "causal_lm"),
    ("T5", "ConditionalGeneration", "seq2seq_lm"),
    ("Bart", "ConditionalGeneration", "seq2seq_lm"),
    ("Bert", "QuestionAnswering", "question_answering"),
    ("DistilBert", "QuestionAnswering", "question_answering"),
    ("Bert", "MultipleChoice", "multiple_choice"),
]


def head_id(head):
    architecture, kind, task = head
    joint = "" if kind == "LMHeadModel" else "For"
    suffix = "" if task == "single_label_classification" else f"-{task.split('_')[0]}"
    return f"{architecture}{joint}{kind}{suffix if 'Sequence' in kind else ''}"


def build(head, dtype=torch.float64, seed=0):
    """Make the model of a head, with random weights and no dropout."""
    architecture, kind, task = head
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(vocab_size=VOCAB, **NO_DROPOUT, **SIZES[architecture])
    config.num_labels = {"regression": 1, "question_answering": 2}.get(task, CLASSES)
    if kind == "SequenceClassification":
        config.problem_type = task
    torch.manual_seed(seed)
    name = f"{architecture}LMHeadModel" if kind == "LMHeadModel" else f"{architecture}For{kind}"
    return getattr(transformers, name)(config).to(dtype).train()


def make_batch(head, num_rows, seed=0, dtype=torch.float64):
    """Make a batch of ragged rows: between 3 and all tokens, some labels ignored."""
    architecture, _, task = head
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    shape = (num_rows, CHOICES, LENGTH) if task == "multiple_choice" else (num_rows, LENGTH)
    lengths = integers(3, LENGTH + 1, *shape[:-1])
    mask = (torch.arange(LENGTH) < lengths[..., None]).long()
    ids = integers(3, VOCAB, *shape) * mask
    if architecture in ("T5", "Bart"):  # their classification head looks for the end of the text
        end = {"T5": 1, "Bart": 2}[architecture]
        ids = ids.scatter(-1, lengths[..., None] - 1, end)
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "question_answering":
        # Positions at LENGTH lie outside the window and are ignored, of start and end apart.
        start = integers(0, LENGTH + 4, num_rows).clamp(max=LENGTH)
        end = integers(0, LENGTH + 4, num_rows).clamp(max=LENGTH)
        return batch | {"start_positions": start, "end_positions": end}
    if task == "multi_label_classification":
        return batch | {"labels": integers(0, 2, num_rows, CLASSES).to(dtype)}
    if task == "regression":
        return batch | {"labels": torch.randn(num_rows, generator=generator, dtype=dtype)}
    if task == "multiple_choice":
        return batch | {"labels": integers(0, CHOICES, num_rows)}
    if task == "single_label_classification":
        labels = integers(0, CLASSES, num_rows)
        return batch | {"labels": labels.masked_fill(integers(0, 6, num_rows) == 0, -100)}
    classes = CLASSES if task == "token_classification" else VOCAB
    labels = integers(0, classes, num_rows, LENGTH)
    ignored = (mask == 0) | (integers(0, 3, num_rows, LENGTH) == 0)
    if task == "masked_lm":
        ignored |= integers(0, 5, num_rows, LENGTH) > 0
    return batch | {"labels": labels.masked_fill(ignored, -100)}
