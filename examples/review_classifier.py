"""Train a small sentiment classifier from scratch and save it as a Hugging Face folder.

    python examples/review_classifier.py reviews.jsonl runs/review-classifier

The folder is what `configs/ppo_reviews.yaml` takes as its reward model. Rows are `{"text": ..., "label": 0 or 1}`;
a tenth of them is held out to measure the accuracy. Takes about half a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from rlhf_ray.models.tokenizers import build_tokenizer

EPOCHS, BATCH, LR, MAX_TOKENS = 3, 64, 1e-3, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(rows)
    held_out, train = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    tokenizer = build_tokenizer("word", [row["text"] for row in train], vocab_size=8000, max_length=MAX_TOKENS)
    tokenizer.padding_side = "right"  # BERT reads its first token
    torch.manual_seed(args.seed)
    model = BertForSequenceClassification(bert_config(tokenizer))
    for epoch in range(EPOCHS):
        train_epoch(model, tokenizer, train, epoch, args.seed)
        print(f"epoch {epoch + 1}: held-out accuracy {accuracy(model, tokenizer, held_out):.3f}")
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"saved to {args.folder}")


def bert_config(tokenizer: PreTrainedTokenizerBase) -> BertConfig:
    # One layer and much dropout: 8,000 sentences teach words, not grammar, and more layers only remember them.
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> dict[str, torch.Tensor]:
    encoded = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def train_epoch(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: list[dict], epoch: int, seed: int
) -> None:
    model.train()
    rate = LR * (1 - epoch / EPOCHS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    order = random.Random(f"{seed}/{epoch}").sample(rows, len(rows))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        labels = torch.tensor([row["label"] for row in batch])
        model(**encode(tokenizer, batch), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), 256):
        batch = rows[start : start + 256]
        guess = model(**encode(tokenizer, batch)).logits.argmax(-1)
        right += int((guess == torch.tensor([row["label"] for row in batch])).sum())
    return right / len(rows)


if __name__ == "__main__":
    main()
