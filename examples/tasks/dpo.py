"""Direct preference optimization: a model learns which of two replies is the better one."""

from functools import partial

from replies import WORDS, preferences, small_llama, word_tokenizer

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import dpo, margins, preference_pairs, preferred


def main(quick: bool = False) -> dict[str, float]:
    tokenizer = word_tokenizer(WORDS)
    model, reference = small_llama(tokenizer), small_llama(tokenizer)
    data = {
        "train": preferences(40 if quick else 800, seed=1),
        "validation": preferences(20 if quick else 200, seed=2),
    }
    loaders = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=preference_pairs(tokenizer), batch_size=16
    )
    loss_fn = dpo(beta=0.1, reference=reference)
    evaluate = partial(
        evaluate_loop, model, loaders["validation"], preferred, loss_fn=loss_fn, decode=margins
    )
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=1e-3),
        num_epochs=1 if quick else 3,
        loss_fn=loss_fn,
        evaluate=evaluate,
        progress_bar=False,
    )
    scores = result.metrics
    print(f"the better reply is ahead in {scores['accuracy']:.3f} of pairs (baseline: 0.500)")
    return dict(scores)


if __name__ == "__main__":
    main()
