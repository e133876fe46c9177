"""Two gloo processes, ragged micro-batches: the gradient is that of the one big batch."""

import torch
from accelerate import Accelerator
from heads import HEADS, build, head_id, make_batch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from manualloop import Accelerated, accumulate_gradients, count_items

NUM_ROWS = 32
CHOSEN = {
    "BertForSequenceClassification": 1e-12,
    "BertForTokenClassification": 1e-12,
    "BertForMaskedLM": 1e-12,
    "BertForSequenceClassification-multi": 1e-12,
    "T5ForConditionalGeneration": 1e-12,
    "LlamaForCausalLM": 1e-6,  # transformers computes its loss in float32
}
# Rows of the micro-batches of rank 0, then of rank 1.
SPLITS = [([16], [16]), ([3, 10], [12, 7]), ([1, 2, 3], [20, 5, 1])]


def rows_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def main(folder):
    accelerator = Accelerator(cpu=True)
    strategy = Accelerated(accelerator)
    assert strategy.world_size == 2
    heads = [head for head in HEADS if head_id(head) in CHOSEN]
    for head in heads:
        batch = make_batch(head, NUM_ROWS)
        if head_id(head) == "BertForTokenClassification":
            batch["labels"][:13] = -100  # rank 0 has nothing to learn from in some splits
        whole = build(head)
        loss = whole(**batch).loss
        loss.backward()
        exact = gradients(whole)
        inner = build(head)
        model = strategy.prepare_model(inner)
        assert strategy.prepare_model(inner) is strategy.prepare_model(model) is model
        num_reductions = 0

        def count(state, bucket):
            nonlocal num_reductions
            num_reductions += bucket.is_last()
            return allreduce_hook(state, bucket)

        model.register_comm_hook(None, count)
        for split in SPLITS:
            parts = torch.arange(NUM_ROWS).split([*split[0], *split[1]])
            own = (
                parts[: len(split[0])] if accelerator.process_index == 0 else parts[len(split[0]) :]
            )
            model.zero_grad()
            num_reductions = 0
            update = accumulate_gradients(
                model, [rows_of(batch, rows) for rows in own], strategy=strategy
            )
            difference = (gradients(model) - exact).abs().max() / exact.abs().max()
            assert difference <= CHOSEN[head_id(head)], (head, split, float(difference))
            assert update.num_items == count_items(whole, batch)
            torch.testing.assert_close(update.loss, loss.detach(), rtol=1e-6, atol=0)
            assert num_reductions == 1, "gradients are reduced once a window"
    assert len(heads) == len(CHOSEN)
