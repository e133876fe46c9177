"""Small runs to report on, and texts that would like to be more than texts."""

import torch
from torch import nn

from manualloop import train_loop

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><h1>x",
    "{{ 7 * 7 }}{% raw %}",
    "nul\0 bell\a escape\x1b[31m next\x85",
    "\u202eright to left\u2066",
    "\ud800 half",
    "שלום עולם",
    "x" * 100_000,
    "' or 1=1 --<!-- <![CDATA[ ]]> &amp; &lt;",
)


class Linear(nn.Module):
    def __init__(self, outputs=3, loss=nn.functional.cross_entropy):
        super().__init__()
        self.layer, self.loss = nn.Linear(4, outputs), loss

    def forward(self, x, labels=None):
        logits = self.layer(x)
        logits = logits.squeeze(-1) if self.layer.out_features == 1 else logits
        return {"logits": logits} | ({} if labels is None else {"loss": self.loss(logits, labels)})


def batches(labels):
    x = torch.arange(len(labels) * 4.0).reshape(-1, 4) % 7 / 7
    return [{"x": x[n : n + 5], "labels": labels[n : n + 5]} for n in range(0, len(labels), 5)]


def trained(model, data, **options):
    options = {"num_epochs": 2, "log_every": 1, "progress_bar": False, **options}
    return train_loop(model, data, torch.optim.SGD(model.parameters(), lr=0.1), **options)
