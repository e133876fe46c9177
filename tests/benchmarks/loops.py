"""The contestants: the same training, or evaluation, written for each library.

Each takes a job, builds what it needs, and returns ``(model, run)``. ``run()`` is what is timed: an
epoch, after which it returns the optimizer; or an evaluation, which returns the scores.

All train with AdamW at the job's learning rate, decayed linearly and stepped every update, without
clipping, accumulation, checkpoints or logs, and show a bar. Only the course's loop is as it is in
the course: AdamW in its default form, rows of the format "torch". All others get the faster fused
form and the faster plain rows, and what they do beyond that is switched off where it can be.
Lightning and Ignite are imported in functions: the tests' environment does not have them.
"""

import tempfile
from functools import partial

import torch
from measure import DEVICE
from torch.utils.data import RandomSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from manualloop import evaluate_loop, prepare_optimizer, prepare_strategy, train_loop

ON_CPU = DEVICE.type == "cpu"


def course(job):
    """The loop of the Hugging Face course, chapter "A full training", as it is there."""
    model = job.new_model()
    loader = job.loader(job.torch_rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    lr_scheduler = job.schedule(optimizer)
    model.to(DEVICE)

    def run():
        progress_bar = tqdm(range(job.num_steps))
        model.train()
        for batch in loader:
            batch = {k: v.to(DEVICE) for k, v in batch.items()}
            outputs = model(**batch)
            loss = outputs["loss"]
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            progress_bar.update(1)
        progress_bar.close()
        return optimizer

    return model, run


def bare(job, batches=None, *, bf16=False):
    """As little as a loop can be: a fused optimizer, no bar. ``batches``: a list, at no cost.

    Without it, the rows in the order of manualloop's default: the weights are to be the same.
    """
    model = job.new_model().to(DEVICE)
    if batches is None:
        order = RandomSampler(job.rows, generator=torch.Generator().manual_seed(42))
        batches = job.loader(job.rows, None, sampler=order, generator=torch.Generator())
    optimizer = job.fused_adamw(model)
    lr_scheduler = job.schedule(optimizer)
    forward = torch.autocast(DEVICE.type, torch.bfloat16)(model) if bf16 else model

    def run():
        model.train()
        for batch in batches:
            batch = {k: v.to(DEVICE, non_blocking=True) for k, v in batch.items()}
            forward(**batch)["loss"].backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        return optimizer

    return model, run


def limit(job):
    """The bare loop on the very batches of manualloop's grouped order, made beforehand."""
    return bare(job, list(job.prepared(group_by_length=True)))


def manualloop(job, *, mixed_precision="no", compile=False, own_loader=False, **options):
    """Ours, on a prepared loader (``options``), or on the DataLoader that the others get.

    What is compiled is kept for the models of later turns, so that only the first turn, which does
    not count, compiles.
    """
    model = job.new_model()
    loader = job.loader(job.rows) if own_loader else job.prepared(**options)
    strategy = prepare_strategy(DEVICE, mixed_precision=mixed_precision, compile=compile)
    optimizer = prepare_optimizer(model, lr=job.lr)

    def run():
        train_loop(model, loader, optimizer, num_epochs=1, strategy=strategy)
        return optimizer

    return model, run


def accelerate(job):
    """The course's loop with accelerate: the scheduler is not prepared, as it is not there."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the Trainer's may be of bf16
    accelerator = Accelerator(cpu=ON_CPU, mixed_precision="no")
    model = job.new_model()
    loader, prepared, optimizer = accelerator.prepare(
        job.loader(job.rows), model, job.fused_adamw(model)
    )
    lr_scheduler = job.schedule(optimizer)

    def run():
        progress_bar = tqdm(range(job.num_steps))
        prepared.train()
        for batch in loader:
            loss = prepared(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            progress_bar.update(1)
        progress_bar.close()
        return optimizer.optimizer

    return model, run


# By default the Trainer reads the loss each step to see whether it is NaN, logs every 500 steps,
# and clips. max_grad_norm=0 leaves the gradients as they are, as all others do; it computes their
# norm all the same. Its AdamW is the fused one by default. To group by length it reads every row.
AT_BEST = {"logging_nan_inf_filter": False, "logging_strategy": "no", "max_grad_norm": 0.0}
GROUPED = {"train_sampling_strategy": "group_by_length"}


def new_trainer(model, job, **options):
    """A Trainer that saves nothing: by default it writes a checkpoint at the end of the run.

    The rows hold nothing but what the model takes, so there is nothing to remove.
    """
    with tempfile.TemporaryDirectory() as folder:  # nothing will be written to it
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.batch_size,
            per_device_eval_batch_size=job.batch_size,
            num_train_epochs=1,
            learning_rate=job.lr,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=not ON_CPU,
            use_cpu=ON_CPU,
            **options,
        )
        return Trainer(
            model,
            arguments,
            train_dataset=job.rows,
            eval_dataset=job.rows,
            data_collator=job.collate,
            compute_metrics=accuracy_of,
        )


def trainer(job, **options):
    """transformers.Trainer."""
    model = job.new_model()
    built = new_trainer(model, job, disable_tqdm=False, **options)

    def run():
        built.train()
        return built.optimizer.optimizer

    return model, run


def fabric(job, **options):
    """Lightning Fabric, in the course's loop. It has nothing that could be switched off."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator=DEVICE.type, devices=1, **options)
    model = job.new_model()
    raw = job.fused_adamw(model)
    wrapped, optimizer = fabric.setup(model, raw)
    loader = fabric.setup_dataloaders(job.loader(job.rows))
    lr_scheduler = job.schedule(raw)

    def run():
        progress_bar = tqdm(range(job.num_steps))
        wrapped.train()
        for batch in loader:
            loss = wrapped(**batch)["loss"]
            fabric.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            progress_bar.update(1)
        progress_bar.close()
        return raw

    return model, run


def lightning(job, bar_every=None):
    """Lightning's Trainer without logger, checkpoints, summary, and anything that validates.

    Its bar is by default that of rich, where that is installed, as it is with huggingface_hub;
    that of tqdm draws as often as it is told to. (``barebones=True`` would take the bar away.)
    """
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as Lightning
    from lightning.pytorch.callbacks import TQDMProgressBar

    model = job.new_model()
    optimizer = job.fused_adamw(model)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            schedule = {"scheduler": job.schedule(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    module, loader = Module(), job.loader(job.rows)
    built = Lightning(
        accelerator="cpu" if ON_CPU else "gpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=bar_every and [TQDMProgressBar(refresh_rate=bar_every)],
        default_root_dir=tempfile.gettempdir(),  # nothing is written to it
    )

    def run():
        built.fit(module, loader)
        return optimizer

    return model, run


def ignite(job, bar_every=1):
    """Ignite: an Engine with an update function of our own, which returns nothing to be kept.

    Its bar sets its description every step, which draws it anew, unless attached less often.
    """
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar

    model = job.new_model().to(DEVICE)
    loader = job.loader(job.rows)
    optimizer = job.fused_adamw(model)
    lr_scheduler = job.schedule(optimizer)

    def update(engine, batch):
        batch = {k: v.to(DEVICE, non_blocking=True) for k, v in batch.items()}
        model(**batch)["loss"].backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

    engine = Engine(update)
    ProgressBar().attach(engine, event_name=Events.ITERATION_COMPLETED(every=bar_every))

    def run():
        model.train()
        engine.run(loader, max_epochs=1)
        return optimizer

    return model, run


OVERHEAD = {
    "the course's loop": course,
    "bare loop, fused AdamW, no bar": bare,
    "manualloop": manualloop,
    "manualloop, a DataLoader of one's own": partial(manualloop, own_loader=True),
    "accelerate": accelerate,
    "Trainer": trainer,
    "Trainer, at its best": partial(trainer, **AT_BEST),
    "Fabric": fabric,
    "Lightning": lightning,
    "Lightning, at its best": partial(lightning, bar_every=50),
    "Ignite": ignite,
    "Ignite, at its best": partial(ignite, bar_every=50),
}
TRAIN = {
    "the course's loop": course,
    "bare loop, grouped batches made before": limit,
    "manualloop": manualloop,
    "manualloop, grouped": partial(manualloop, group_by_length=True),
    "manualloop, grouped, bf16": partial(manualloop, mixed_precision="bf16", group_by_length=True),
    "manualloop, grouped, compiled": partial(manualloop, compile=True, group_by_length=True),
    "accelerate": accelerate,
    "Trainer": trainer,
    "Trainer, at its best: grouped": partial(trainer, **AT_BEST, **GROUPED),
    "Trainer, at its best: grouped, bf16": partial(trainer, **AT_BEST, **GROUPED, bf16=True),
    "Fabric": fabric,
    "Lightning": partial(lightning, bar_every=50),
    "Ignite": partial(ignite, bar_every=50),
}
BASE = {
    "a loop by hand": partial(bare, bf16=True),
    "manualloop": partial(manualloop, mixed_precision="bf16"),
    "manualloop, compiled": partial(manualloop, mixed_precision="bf16", compile=True),
    "Trainer, at its best": partial(trainer, **AT_BEST, bf16=True),
    "Fabric": partial(fabric, precision="bf16-mixed"),
}
# Both see the same batches in the same order, so they must end with the same weights.
SAME_BITS = [
    ("bare loop, fused AdamW, no bar", "manualloop"),
    ("bare loop, grouped batches made before", "manualloop, grouped"),
    ("a loop by hand", "manualloop"),
]


def course_evaluation(job):
    """The evaluation loop of the same chapter. Its metric: see ``accuracy_module``."""
    model = job.new_model().to(DEVICE)
    loader = job.loader(job.torch_rows, shuffle=False)
    metric = accuracy_module()

    def run():
        model.eval()
        for batch in loader:
            batch = {k: v.to(DEVICE) for k, v in batch.items()}
            with torch.no_grad():
                outputs = model(**batch)
            predictions = torch.argmax(outputs["logits"], dim=-1)
            metric.add_batch(predictions=predictions, references=batch["labels"])
        return metric.compute()

    return model, run


def manualloop_evaluation(job):
    model, loader = job.new_model(), job.prepared()
    strategy = prepare_strategy(DEVICE)
    return model, lambda: evaluate_loop(model, loader, "glue/sst2", strategy=strategy)


def trainer_evaluation(job, **options):
    """Trainer.evaluate; with its own grouping by length it sorts these rows, too."""
    model = job.new_model()
    built = new_trainer(model, job, **options)
    return model, lambda: {"accuracy": built.evaluate()["eval_accuracy"]}


EVALUATE = {
    "the course's loop": course_evaluation,
    "manualloop": manualloop_evaluation,
    "Trainer": partial(trainer_evaluation, disable_tqdm=False),
    "Trainer, at its best: grouped": partial(trainer_evaluation, disable_tqdm=True, **GROUPED),
}


def accuracy_of(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def accuracy_module():
    """A metric of the library evaluate. Its own ("glue", "sst2") is downloaded when it is loaded.

    This one is made here of the same base class, which does the work of ``add_batch``, and has the
    same line in ``_compute``.
    """
    from datasets import Features, Value
    from evaluate import Metric, MetricInfo

    class Accuracy(Metric):
        def _info(self):
            integers = Features(predictions=Value("int64"), references=Value("int64"))
            return MetricInfo("", "", integers, inputs_description="", format="numpy")

        def _compute(self, predictions, references):
            return {"accuracy": float((predictions == references).mean())}

    return Accuracy(experiment_id="benchmark")
