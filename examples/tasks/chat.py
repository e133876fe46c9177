"""Teach a small Llama to answer questions about months, from chats.

python examples/tasks/chat.py
"""

from functools import partial

import torch
from datasets import disable_progress_bars
from months import chat_tokenizer, month_chats
from transformers import LlamaConfig, LlamaForCausalLM

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import chat


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    disable_progress_bars()
    data = month_chats(100 if quick else 1000)
    tokenizer = chat_tokenizer(data)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **sizes, **ends)
    model = LlamaForCausalLM(config)

    options = {"preprocess": chat(tokenizer), "max_tokens": 256, "pack": True}
    loaders = prepare_dataloaders(data, tokenizer, model=model, **options)
    evaluate = partial(evaluate_loop, model, loaders["validation"], "perplexity")
    baseline = evaluate()["perplexity"]
    optimizer = prepare_optimizer(model, lr=3e-3)
    result = train_loop(model, loaders["train"], optimizer, num_epochs=2, evaluate=evaluate)
    print(f"perplexity {result.metrics['perplexity']:.3f} (baseline, untrained: {baseline:.1f})")

    asked = [{"role": "user", "content": "Which month comes after May ?"}]
    prompt = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    ids = model.generate(**tokenizer.apply_chat_template(asked, **prompt), max_new_tokens=8)
    print(tokenizer.decode(ids[0]))
    return result.metrics


if __name__ == "__main__":
    main()
