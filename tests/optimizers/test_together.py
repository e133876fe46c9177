"""Several optimizers and schedules in one run equal the loop that is written by hand with both."""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manualloop import (
    Accelerated,
    CheckpointError,
    ConfigError,
    ModelError,
    NonFiniteError,
    SingleDevice,
    TrainState,
    Update,
    accumulate_gradients,
    load_checkpoint,
    prepare_optimizer,
    prepare_scheduler,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.optimizers.together import Optimizers

CPU = SingleDevice("cpu")
ROWS = [{"x": torch.full((4, 4), 0.5 + row, dtype=torch.float64)} for row in range(6)]


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def pair(model: nn.Module, kind: Any = torch.optim.SGD) -> list[torch.optim.Optimizer]:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    return [kind(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.01)]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])


def train(model: nn.Module, *args: Any, **options: Any) -> Any:
    options = {"num_epochs": 1, "loss_fn": loss_fn, "strategy": CPU, **options}
    return train_loop(model, options.pop("rows", ROWS), *args, progress_bar=False, **options)


def by_hand(model: nn.Module, optimizers: Any, names: Any, norm: float | None) -> Tensor:
    schedules = [
        prepare_scheduler(optimizer, name, num_training_steps=len(ROWS))
        for optimizer, name in zip(optimizers, names, strict=True)
        if name is not None
    ]
    ordered = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    for batch in ROWS:
        loss_fn(model, batch).backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(ordered, norm)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
    return weights(model)


@pytest.mark.parametrize("norm", [None, 0.5])
@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("linear", ["linear", "linear"]),
        (["linear", "cosine"], ["linear", "cosine"]),
        (("cosine", None), ["cosine", None]),
        (None, [None, None]),
    ],
)
def test_a_run_has_the_bits_of_the_loop_by_hand(given: Any, names: Any, norm: float | None) -> None:
    other = net()
    expected = by_hand(other, pair(other), names, norm)
    model = net()
    result = train(model, optimizers := pair(model), given, max_grad_norm=norm)
    assert torch.equal(weights(model), expected)
    assert isinstance(result.state.optimizer, tuple)
    assert list(result.state.optimizer) == optimizers
    assert result.history[0]["lr"] == 0.1


def test_level_two_and_schedules_that_were_built() -> None:
    other, model = net(), net()
    expected = by_hand(other, pair(other), ["linear", "cosine"], 0.5)
    optimizers = pair(model)
    schedules = [
        prepare_scheduler(optimizer, name, num_training_steps=6)
        for optimizer, name in zip(optimizers, ["linear", "cosine"], strict=True)
    ]
    state = TrainState(model, optimizers, schedules)
    for _ in train_steps(state, ROWS, num_epochs=1, max_grad_norm=0.5, loss_fn=loss_fn):
        pass
    assert torch.equal(weights(model), expected)
    assert [schedule.last_epoch for schedule in schedules] == [6, 6]
    assert state.lr_scheduler is not None
    assert len(state.lr_scheduler.get_last_lr()) == 2


def test_one_optimizer_stays_what_was_given() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = prepare_scheduler(optimizer, num_training_steps=3)
    state = TrainState(model, optimizer, schedule)
    assert state.optimizer is optimizer
    assert state.lr_scheduler is schedule
    state = TrainState(model, [optimizer], [schedule])
    assert state.optimizer is optimizer
    assert state.lr_scheduler is schedule
    assert train(model, [optimizer]).state.optimizer is optimizer


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda m: [], "empty list"),
        (lambda m: "adamw", "optimizer is a str"),
        (lambda m: [*pair(m), "adamw"], r"optimizer\[2\] is a str"),
        (lambda m: [pair(m)[0]] * 2, r"optimizer\[1\] is the same SGD"),
        (
            lambda m: [pair(m)[0], torch.optim.Adam(m.parameters())],
            r"shape \(4, 4\) is both in optimizer\[0\] \(SGD\) and in optimizer\[1\] \(Adam\)",
        ),
    ],
)
def test_what_is_refused(build: Any, line: str) -> None:
    model = net()
    before = weights(model)
    with pytest.raises(ConfigError, match=line):
        TrainState(model, build(model))
    with pytest.raises(ConfigError, match=line):
        train(model, build(model))
    state = TrainState(model, pair(model)[0])
    state.optimizer = build(model)
    with pytest.raises(ConfigError, match=line):
        train_steps(state, ROWS, num_epochs=1, loss_fn=loss_fn)
    assert torch.equal(weights(model), before)


def test_schedules_that_do_not_fit() -> None:
    model = net()
    optimizers = pair(model)
    built = [prepare_scheduler(optimizer, num_training_steps=6) for optimizer in optimizers]
    for given in (built[0], built[:1], [*built, None]):
        with pytest.raises(ConfigError, match=r"2 optimizers \(SGD \+ AdamW\)"):
            train(model, optimizers, given)
    with pytest.raises(ConfigError, match="drives another optimizer"):
        train(model, optimizers, built[::-1])
    with pytest.raises(ConfigError, match="'lineal' is unknown"):
        train(model, optimizers, ["linear", "lineal"])


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_an_interrupted_run_resumes_to_the_same_bits(kind: Any, tmp_path: Any) -> None:
    def run(folder: str, stop: int | None = None) -> Any:
        def on_step(step: Any) -> None:
            if step.index == stop:
                raise KeyboardInterrupt

        model = net()
        options = {"checkpoint_dir": tmp_path / folder, "checkpoint_every": 1, "on_step": on_step}
        return train(model, pair(model, kind), ["linear", "cosine"], max_grad_norm=0.5, **options)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=4)
    resumed = run("parts")
    assert torch.equal(weights(whole.state.model), weights(resumed.state.model))
    assert resumed.history == whole.history
    ours, theirs = resumed.state, whole.state
    assert [s.state_dict() for s in ours.lr_scheduler] == [
        s.state_dict() for s in theirs.lr_scheduler
    ]


def test_other_optimizers_are_refused(tmp_path: Any) -> None:
    def build(order: int = 1) -> TrainState:
        model = net()
        return TrainState(model, pair(model)[::order])

    state = build()
    for _ in train_steps(state, ROWS, num_epochs=1, loss_fn=loss_fn, strategy=CPU):
        pass
    save_checkpoint(tmp_path, state, strategy=CPU)
    model = net()
    for other in (build(-1), TrainState(model, torch.optim.AdamW(model.parameters()))):
        before = weights(other.model)
        with pytest.raises(CheckpointError, match=r"optimizer: SGD \+ AdamW"):
            load_checkpoint(tmp_path, other, strategy=CPU)
        with pytest.raises(ConfigError, match="optimizer"):
            other.load_state_dict(state.state_dict())
        assert torch.equal(weights(other.model), before)
    schedules = [None, prepare_scheduler((o := build()).optimizer[1], num_training_steps=6)]
    with pytest.raises(CheckpointError, match="lr_scheduler"):
        load_checkpoint(tmp_path, TrainState(o.model, o.optimizer, schedules), strategy=CPU)


# NaN, loss scales, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_skipped_update_moves_neither(norm: float | None) -> None:
    rows = [*ROWS[:2], {"x": torch.full((4, 4), math.nan).double()}, *ROWS[2:]]
    model, other = net(), net()
    expected = by_hand(other, pair(other), [None, None], norm)
    state = train(
        model, pair(model), None, rows=rows, max_grad_norm=norm, on_nonfinite="skip"
    ).state
    assert state.progress.num_skipped == 1
    assert torch.equal(weights(model), expected)
    with pytest.raises(NonFiniteError, match="at step 3"):
        train(model, pair(model), None, rows=rows, max_grad_norm=norm)


def fp16_rows(overflow_at: int) -> list[dict[str, Tensor]]:
    rows = [{"x": torch.full((4, 4), 0.25 * (1 + row))} for row in range(6)]
    rows[overflow_at]["x"] = torch.full((4, 4), 300.0)
    return rows


@pytest.mark.parametrize("norm", [None, 0.5])
def test_one_loss_scale_holds_for_both(norm: float | None) -> None:
    """The second layer alone overflows, and neither optimizer makes its update."""

    def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = net().float()
        first = torch.optim.AdamW(model[0].parameters(), lr=0.01)
        return model, [first, torch.optim.SGD(model[2].parameters(), lr=0.01)]

    def loss(model: Any, batch: Any) -> Tensor:
        hidden = model[1](model[0](batch["x"].clamp(max=2)))
        return (model[2](hidden) * batch["x"].amax() ** 2).mean()

    model, optimizers = build()
    strategy, rows = SingleDevice("cpu", mixed_precision="fp16"), fp16_rows(3)
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    state = TrainState(model, optimizers)
    options = {"num_epochs": 1, "loss_fn": loss, "strategy": strategy, "max_grad_norm": norm}
    for _ in train_steps(state, rows, **options):
        pass

    other, own = build()
    scaler, ordered = torch.amp.GradScaler("cpu", init_scale=2.0**12), [*other.parameters()]
    num_skipped = 0
    for batch in rows:
        with torch.autocast("cpu", dtype=torch.float16):
            value = loss(other, batch)
        scaler.scale(value).backward()
        both = Optimizers(own)  # one decision for both
        scaler.unscale_(both)
        if norm is not None:
            nn.utils.clip_grad_norm_(ordered, norm)
        if all(torch.isfinite(p.grad).all() for p in ordered):
            for optimizer in own:
                optimizer.step()
        else:
            num_skipped += 1
        scaler.update()
        other.zero_grad()
    assert num_skipped == state.progress.num_skipped == 1
    assert strategy.scaler.get_scale() == scaler.get_scale()
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("norm", [None, 0.5])
def test_accelerate_has_one_loss_scale_for_both(
    norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its wrappers would update the scale, and unscale what is unscaled already."""
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True)
    # accelerate knows fp16 on accelerators only; torch's scaler knows the CPU, too.
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    single = SingleDevice("cpu", mixed_precision="fp16")
    single.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    ends, scalers = [], (accelerator.scaler, single.scaler)
    for strategy in (Accelerated(accelerator), single):
        model = net().float()
        first = torch.optim.AdamW(model[0].parameters(), lr=0.01)
        state = TrainState(model, [first, torch.optim.SGD(model[2].parameters(), lr=0.01)])

        def loss(model: Any, batch: Any) -> Tensor:
            return (model(batch["x"].clamp(max=2)) * batch["x"].amax() ** 2).mean()

        options = {"loss_fn": loss, "strategy": strategy, "max_grad_norm": norm}
        for _ in train_steps(state, fp16_rows(3), num_epochs=1, **options):
            pass
        ends.append((weights(model), state.progress.num_skipped))
    assert torch.equal(ends[0][0], ends[1][0])
    assert [skipped for _, skipped in ends] == [1, 1]
    assert [scaler.get_scale() for scaler in scalers] == [2.0**11] * 2


def test_a_step_fn_gets_both() -> None:
    def step_fn(state: TrainState, batches: Any, strategy: Any) -> Update:
        first, second = state.optimizer  # type: ignore[misc]
        update = accumulate_gradients(state.model, batches, loss_fn=loss_fn, strategy=strategy)
        first.step()  # type: ignore[has-type]
        second.step()  # type: ignore[has-type]
        state.optimizer.zero_grad()
        return update

    model, other = net(), net()
    expected = by_hand(other, pair(other), [None, None], None)
    state = TrainState(model, pair(model))
    for _ in train_steps(state, ROWS, num_epochs=1, step_fn=step_fn, strategy=CPU):
        pass
    assert torch.equal(weights(model), expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_peft_and_their_head(tmp_path: Any) -> None:
    """Low-rank matrices by Muon, the head by AdamW, on a frozen base; resumed to the same bits."""
    from helpers import tiny_bert
    from peft import LoraConfig, get_peft_model

    def build() -> TrainState:
        torch.manual_seed(0)
        adapters = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        model: Any = get_peft_model(tiny_bert(), adapters)
        return TrainState(model, prepare_optimizer(model, "muon+adamw", lr=0.01))

    ids = [torch.tensor([[2, 5 + row, 6, 3], [2, 7, 8 + row, 3]]) for row in range(4)]
    rows = [{"input_ids": part, "labels": torch.tensor([0, 1])} for part in ids]

    def run(state: TrainState, max_steps: int) -> TrainState:
        for _ in train_steps(state, rows, max_steps=max_steps, strategy=CPU):
            pass
        return state

    muon, adamw = build().optimizer  # type: ignore[misc]
    assert len(muon.param_groups[0]["params"]) == 4  # type: ignore[has-type]
    assert len(adamw.param_groups[0]["params"]) == 2  # type: ignore[has-type]
    torch.manual_seed(1)
    whole = run(build(), 6)
    torch.manual_seed(1)
    save_checkpoint(tmp_path, run(build(), 4), strategy=CPU)
    load_checkpoint(tmp_path, resumed := build(), strategy=CPU)
    assert torch.equal(weights(run(resumed, 6).model), weights(whole.model))


def test_memory_that_runs_out_leaves_no_gradient_of_the_failed_attempt() -> None:
    """Neither in the two optimizers of the state, nor in one that the loop body steps."""
    from helpers import tiny_bert

    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3], [2, 9, 5, 3], [2, 4, 4, 3]])
    rows = [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}] * 3

    def run(limit: int) -> Tensor:
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        forward = model.forward

        @wraps(forward)
        def forward_in_memory(**batch: Any) -> Any:
            if len(batch["input_ids"]) > limit:
                (forward(**batch).loss * 7).backward()  # a part of the gradients is there already
                raise torch.OutOfMemoryError("too many rows")
            return forward(**batch)

        model.forward = forward_in_memory
        others = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
        state = TrainState(model, pair(model.bert), extras={"others": others})
        for _ in train_steps(state, rows, num_epochs=1, strategy=CPU):
            others.step()
            others.zero_grad()
        return weights(model)

    assert torch.allclose(run(2), run(4), rtol=1e-9, atol=1e-12)


def test_an_optimizer_in_the_loop_body_gets_the_gradient_of_the_items_counted() -> None:
    """loss_fn counts other items than the labels show; the gradient is that of its mean."""

    def run(rows: Any, window: int) -> Tensor:
        model = net()
        second = torch.optim.SGD(model[2].parameters(), lr=0.1)
        state = TrainState(
            model, torch.optim.SGD(model[0].parameters(), lr=0.1), extras={"second": second}
        )

        def loss(model: nn.Module, batch: Any) -> Any:
            return model(batch["x"]).square().mean(), 3 * len(batch["x"])

        options = {"gradient_accumulation_steps": window, "loss_fn": loss, "strategy": CPU}
        for _ in train_steps(state, rows, num_epochs=1, **options):
            second.step()
            second.zero_grad()
        return weights(model)

    halves = [{"x": part} for row in ROWS for part in (row["x"][:1], row["x"][1:])]
    assert torch.allclose(run(ROWS, 1), run(halves, 2), rtol=1e-12, atol=1e-14)


# Which parameters --------------------------------------------------------------------------------


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "no optimizer updates" in r.getMessage()]


def test_trainable_parameters_in_no_optimizer_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    train(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    (line,) = messages(caplog)
    assert "2 trainable parameters (5 numbers), the first of them 2.weight" in line
    caplog.clear()
    train(model, pair(model))
    model[2].requires_grad_(False)
    train(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    model[2].requires_grad_(True)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    train(model, torch.optim.SGD(model[0].parameters(), lr=0.1), extras={"second": second})
    assert messages(caplog) == []


@pytest.mark.parametrize("several", [False, True])
def test_a_layer_that_was_replaced_is_refused(several: bool) -> None:
    model = net()
    optimizer = pair(model) if several else torch.optim.SGD(model.parameters(), lr=0.1)
    model[2] = nn.Linear(4, 1).double()
    before = weights(model)
    with pytest.raises(ModelError, match=r"holds 2 of its 4 parameters alone, the first of shape"):
        train(model, optimizer)
    assert torch.equal(weights(model), before)


def test_a_loss_with_weights_is_taken_among_the_extras() -> None:
    model, head = net(), nn.Linear(1, 1).double()
    parameters = [*model.parameters(), *head.parameters()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return head(model(batch["x"])).square().mean()

    with pytest.raises(ModelError, match=r'extras=\{"loss": loss_fn\}'):
        train(model, torch.optim.SGD(parameters, lr=0.1), loss_fn=loss)
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    train(model, optimizer, loss_fn=loss, extras={"head": head})
    assert not torch.equal(head.weight, before)


def test_scaled_gradients_do_not_reach_an_optimizer_in_the_loop_body() -> None:
    model = net().float()
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    with pytest.raises(ConfigError, match=r"The SGD in extras\['second'\] .* loss scale"):
        train(model, first, strategy=strategy, extras={"second": second})


def test_an_optimizer_that_needs_a_closure() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigError, match=r"LBFGS.step\(\) needs closure"):
        train(model, optimizer, None)
    with pytest.raises(ConfigError, match=r"LBFGS.step\(\) needs closure"):
        train(model, [torch.optim.SGD([model[0].weight]), torch.optim.LBFGS([model[0].bias])])


# Muon and AdamW ----------------------------------------------------------------------------------


def names_in(optimizer: Any, model: nn.Module) -> set[str]:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in own}


def test_the_pair_of_muon_and_adamw() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)
    )
    muon, adamw = prepare_optimizer(model, "muon+adamw", lr=1e-3, weight_decay=0.1)
    assert isinstance(muon, torch.optim.Muon)
    assert names_in(muon, model) == {"1.weight", "3.weight"}
    assert names_in(adamw, model) == {n for n, _ in model.named_parameters()} - {
        "1.weight",
        "3.weight",
    }
    (group,) = muon.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"].long()).square().mean()

    rows = ROWS[:1] * 20
    result = train(model, prepare_optimizer(model, "muon+adamw", lr=0.01), rows=rows, loss_fn=loss)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_embeddings_and_heads_of_transformers_go_to_adamw() -> None:
    from helpers import tiny_bert
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    bert = tiny_bert()
    muon, adamw = prepare_optimizer(bert, "muon+adamw")
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= names_in(adamw, bert)
    assert "bert.encoder.layer.0.attention.self.query.weight" in names_in(muon, bert)
    assert not any("embeddings" in name for name in names_in(muon, bert))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=4, n_layer=1, n_head=2))
    muon, adamw = prepare_optimizer(gpt2, "muon+adamw")
    assert names_in(muon, gpt2) == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    sizes = {"vocab_size": 9, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False))
    muon, adamw = prepare_optimizer(t5, "muon+adamw")
    assert "shared.weight" in names_in(adamw, t5)
    assert not any(name in names_in(muon, t5) for name in ("lm_head.weight", "shared.weight"))
    assert not any("relative_attention_bias" in name for name in names_in(muon, t5))


def test_a_pair_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="no trainable matrix in a hidden layer"):
        prepare_optimizer(nn.Linear(3, 3), "muon+adamw")
    with pytest.raises(ConfigError, match="Leave param_groups out"):
        groups = [{"params": net().parameters()}]
        prepare_optimizer(net(), "muon+adamw", param_groups=groups)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="name='lion'"):
        prepare_optimizer(net(), "lion")  # type: ignore[call-overload]
