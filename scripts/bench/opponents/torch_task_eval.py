"""Measures the opponent's gain on a task: scores a held-out split, trains for a few minutes, and scores it again.

    .oracle/bin/python scripts/bench/opponents/torch_task_eval.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --task messages --train examples/titles/train.jsonl.gz --test examples/titles/heldout.jsonl

Tasks, and the format of --train (and --test), plain or .gz:
  messages     conversations of one question and one answer, jsonl; scored by exact match
  title        BoolQ jsonl: title of a Wikipedia passage; scored by exact match
  boolq        BoolQ jsonl, short passages: yes or no; scored by the likelier option
  sst2         SST-2 tsv, --test is the dev split: sentiment; scored by the likelier option
  shakespeare  plain text: next token; scored by perplexity on the last tenth, 512-token windows
The last line is JSON.
"""

import argparse
import csv
import gzip
import json
import math
import os
import random
import time

import torch
from torch.nn.functional import cross_entropy, linear
from torch_qlora_cpu import build, load_tokenizer

# An example is (prompt, answer, options). The loss and the scores include only the answer.


def read(path: str) -> list | str:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", newline="") as f:
        if ".tsv" in path:
            return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [json.loads(line) for line in f] if ".jsonl" in path else f.read()


def chat(question, answer_start=""):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer_start}"


def title_examples(rows):
    """Returns examples of a passage and its title. Each title has one example, so no title is in both splits."""
    by_title = {}
    for row in rows:
        title, separator, body = row["passage"].partition(" -- ")
        if separator and 100 < len(body) < 600:
            by_title.setdefault(title, body)
    return [
        (chat(f"{body}\n\nWhat is the title of this article?", "Title:"), " " + title, None)
        for title, body in by_title.items()
    ]


def boolq_examples(rows):
    return [
        (
            chat(f"{r['passage']}\n\nQuestion: {r['question']}?\nAnswer yes or no."),
            "yes" if r["label"] else "no",
            ("no", "yes"),
        )
        for r in rows
        if len(r["passage"]) < 500
    ]


def sst2_examples(rows):
    options = ("negative", "positive")
    return [
        (
            chat(f"Review: {r['sentence'].strip()}\nIs the review positive or negative?"),
            options[int(r["label"])],
            options,
        )
        for r in rows
        if len(r["sentence"].split()) > 4
    ]


def messages_examples(rows):
    """Returns conversations of one question and one answer."""
    return [(chat(r["messages"][0]["content"]), r["messages"][1]["content"], None) for r in rows]


EXAMPLES = {
    "messages": messages_examples,
    "title": title_examples,
    "boolq": boolq_examples,
    "sst2": sst2_examples,
}


def split(args, tokenizer):
    """Returns (train, test): lists of examples, or of 512-token windows."""
    data = read(args.train)
    if args.task == "shakespeare":
        ids = tokenizer(data)["input_ids"]
        windows = [ids[i : i + 512] for i in range(0, len(ids) - 511, 512)]
        cut = len(windows) * 9 // 10
        return windows[:cut], windows[cut:]
    train = EXAMPLES[args.task](data)
    if args.test:
        return train, EXAMPLES[args.task](read(args.test))[: args.test_rows]
    random.Random(0).shuffle(train)  # the same split for every seed
    return train[args.test_rows :], train[: args.test_rows]


def collate(examples, tokenizer):
    """Returns (ids, labels), padded on the right; the prompt and the padding have label -100."""
    rows = []
    for example in examples:
        if isinstance(example, list):
            rows.append(([], example))
        else:
            rows.append((tokenizer(example[0])["input_ids"], tokenizer(example[1] + "<|im_end|>")["input_ids"]))
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 2)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def answer_logits(model, ids, labels, dtype):
    """Returns logits and targets at the answer tokens, with the row of each.

    The head runs in fp32: bf16 logits near 25 are 0.125 apart, so options often tie, and then the order of the
    vocabulary decides instead of the model.
    """
    causal_lm = model.base_model.model
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype in ("autocast", "mixed")):
        hidden = causal_lm.model(input_ids=ids).last_hidden_state[:, :-1]
    at = labels[:, 1:] != -100
    logits = linear(hidden[at].float(), causal_lm.lm_head.weight.float())
    return logits, labels[:, 1:][at], at.nonzero()[:, 0]


@torch.no_grad()
def evaluate(model, tokenizer, examples, dtype, batch=16):
    # Without model.eval(): on the first such pass bitsandbytes 0.50.2 repacks its weights for inference permanently.
    # That path lacks a backward pass, so later training silently loses the gradient through the base layers. The model
    # has no dropout, so train mode gives the same results.
    assert model.training
    n = len(examples)
    nll = tokens = exact = begins = right = 0
    if not isinstance(examples[0], list):
        examples = sorted(examples, key=lambda e: len(e[0]))
    for start in range(0, n, batch):
        chunk = examples[start : start + batch]
        logits, targets, row = answer_logits(model, *collate(chunk, tokenizer), dtype)
        nll += cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
        if isinstance(chunk[0], list):
            continue
        # Greedy decoding gives the answer if and only if every answer token is the likeliest one.
        hit = logits.argmax(-1) == targets
        for i, (_, answer, options) in enumerate(chunk):
            exact += hit[row == i].all().item()
            begins += hit[row == i][:-1].all().item()  # all but the end token
            if options:  # distinguished by their first token
                first = [tokenizer(o)["input_ids"][0] for o in options]
                right += options[logits[row == i][0, first].argmax().item()] == answer
    scores = {"nll": nll / tokens, "perplexity": math.exp(nll / tokens)}
    if not isinstance(examples[0], list):
        scores |= {"exact_match": exact / n, "begins_with_answer": begins / n}
        if examples[0][2]:
            answers = [e[1] for e in examples]
            scores |= {"accuracy": right / n, "majority_rate": max(map(answers.count, set(answers))) / n}
    return {k: round(v, 4) for k, v in scores.items()}


def train(model, tokenizer, examples, args) -> None:
    """Takes one step per batch of examples; linear warm-up over a tenth of the steps, then linear decay to zero."""
    trainable = [q for q in model.parameters() if q.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.0, fused=True)
    steps = args.train_rows // args.batch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.1 * steps), (steps - s) / (0.9 * steps))
    )
    losses = []
    for s in range(steps):
        ids, labels = collate(examples[s * args.batch : (s + 1) * args.batch], tokenizer)
        logits, targets, _ = answer_logits(model, ids, labels, args.dtype)
        loss = cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if (s + 1) % 10 == 0:
            print(f"step {s + 1}/{steps} loss {sum(losses[-10:]) / 10:.3f}", flush=True)


def read_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", required=True)
    p.add_argument("--task", required=True, choices=[*EXAMPLES, "shakespeare"])
    p.add_argument("--train", required=True)
    p.add_argument("--test", help="(default: rows held out of --train)")
    p.add_argument("--train_rows", type=int, default=800)
    p.add_argument("--test_rows", type=int, default=500)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=float, default=32.0)
    p.add_argument("--dtype", default="mixed", choices=["fp32", "autocast", "mixed", "bf16"])
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = load_tokenizer(args.gguf)
    model = build(args.gguf, args.dtype, rank=args.rank, alpha=args.alpha, seed=args.seed)
    chosen, test = split(args, tokenizer)
    chosen = random.Random(args.seed).sample(chosen, args.train_rows)
    before = evaluate(model, tokenizer, test, args.dtype)
    print("before", before, flush=True)
    started = time.perf_counter()
    train(model, tokenizer, chosen, args)
    train_s = time.perf_counter() - started
    after = evaluate(model, tokenizer, test, args.dtype)
    print(
        json.dumps(
            {
                **{k: v for k, v in vars(args).items() if k not in ("gguf", "train", "test")},
                "steps": args.train_rows // args.batch,
                "test_size": len(test),
                "train_s": round(train_s, 1),
                "before": before,
                "after": after,
            }
        )
    )


if __name__ == "__main__":
    main()
