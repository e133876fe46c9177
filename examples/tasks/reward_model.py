"""A reward model: a number for each reply, larger for the better one of a pair."""

from functools import partial

from replies import WORDS, preferences, small_llama, word_tokenizer
from transformers import LlamaForSequenceClassification

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import margins, preference_pairs, preferred, reward


def main(quick: bool = False) -> dict[str, float]:
    tokenizer = word_tokenizer(WORDS)
    model = small_llama(tokenizer, LlamaForSequenceClassification, num_labels=1)
    data = {
        "train": preferences(40 if quick else 800, seed=1),
        "validation": preferences(20 if quick else 200, seed=2),
    }
    loaders = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=preference_pairs(tokenizer), batch_size=16
    )
    evaluate = partial(
        evaluate_loop, model, loaders["validation"], preferred, loss_fn=reward, decode=margins
    )
    before = evaluate()
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=1e-3),
        num_epochs=1 if quick else 3,
        loss_fn=reward,
        evaluate=evaluate,
        progress_bar=False,
    )
    scores = result.metrics
    print(f"right in {scores['accuracy']:.3f} of pairs (baseline: {before['accuracy']:.3f})")
    return dict(scores)


if __name__ == "__main__":
    main()
