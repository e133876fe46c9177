import evaluate
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
rows = load_dataset("glue", "mrpc").map(
    lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True), batched=True
)
metric = evaluate.load("glue", "mrpc")
arguments = TrainingArguments(
    "runs/mrpc",
    num_train_epochs=3,
    per_device_train_batch_size=8,
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="f1",
    report_to="tensorboard",
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows["train"],
    eval_dataset=rows["validation"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda pred: metric.compute(
        predictions=pred.predictions.argmax(-1), references=pred.label_ids
    ),
)
trainer.train(resume_from_checkpoint=get_last_checkpoint("runs/mrpc"))
print(trainer.evaluate())
