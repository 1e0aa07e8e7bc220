"""Train the small Llama that `make demo` and the tests use, from plain text files.

The text is cut into pieces at paragraph borders; evenly spaced pieces are held out for calibration, for evaluation and
for choosing the learning-rate schedule's end (validation), the rest trains a byte-level BPE tokenizer and the model.
The evaluation perplexity is compared with a unigram model of the same training tokens, and both go into the card.

    python examples/train_demo_checkpoint.py --text books.txt --output_dir assets/demo --device cuda
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the checkpoint besides the text."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 5
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    seqlen: int = 2048
    batch_size: int = 32
    steps: int = 900
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 150
    heldout_bytes: int = 440_000
    pieces: int = 400
    seed: int = 0


def split_text(text: str, recipe: Recipe) -> dict[str, str]:
    """Cut `text` into pieces and deal evenly spaced ones to the held-out splits; the splits share no paragraph."""
    paragraphs = text.split("\n\n")
    target = len(text) / recipe.pieces
    pieces: list[list[str]] = [[]]
    filled = 0
    for paragraph in paragraphs:
        if filled >= target:
            pieces.append([])
            filled = 0
        pieces[-1].append(paragraph)
        filled += len(paragraph) + 2
    per_split = max(1, round(recipe.heldout_bytes / target))
    splits: dict[str, list[str]] = {"train": [], "calibration": [], "evaluation": [], "validation": []}
    stride = len(pieces) / per_split
    heldout = {
        int(index * stride + offset): name
        for offset, name in ((1, "calibration"), (stride / 3 + 1, "evaluation"), (2 * stride / 3 + 1, "validation"))
        for index in range(per_split)
    }
    for index, piece in enumerate(pieces):
        splits[heldout.get(index, "train")].append("\n\n".join(piece))
    return {name: "\n\n".join(parts) for name, parts in splits.items()}


def train_tokenizer(text: str, recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without a template: the text's own tokens and nothing else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[i : i + 100_000] for i in range(0, len(text), 100_000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=recipe.seqlen,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Token ids of a whole text, int64 [tokens]."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model, float32."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.seqlen,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor, seqlen: int) -> float:
    """Mean next-token loss in nats over non-overlapping windows of `seqlen` tokens."""
    windows = tokens[: tokens.numel() // seqlen * seqlen].view(-1, seqlen)
    device = next(model.parameters()).device
    losses = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for window in windows:
            batch = window[None].to(device)
            losses.append(model(batch, labels=batch, use_cache=False).loss.float().item())
    return sum(losses) / len(losses)


def unigram_perplexity(train: torch.Tensor, evaluation: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of `evaluation` under add-one smoothed token frequencies of `train`."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    log_probability = (counts / counts.sum()).log()
    return math.exp(-log_probability[evaluation].mean().item())


def train_model(model: LlamaForCausalLM, tokens: dict[str, torch.Tensor], recipe: Recipe, device: str) -> list[dict]:
    """Train in place with AdamW and a cosine schedule; returns the log, one row every 100 steps."""
    model.to(device).train()
    train = tokens["train"].to(device)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=device.startswith("cuda"),
    )

    def schedule(step: int) -> float:
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(recipe.seed)
    log = []
    started = time.perf_counter()
    for step in track(range(1, recipe.steps + 1), description="training"):
        starts = torch.randint(0, train.numel() - recipe.seqlen, (recipe.batch_size,), generator=generator)
        batch = torch.stack([train[s : s + recipe.seqlen] for s in starts.tolist()])
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == recipe.steps:
            model.eval()
            validation = mean_loss(model, tokens["validation"], recipe.seqlen)
            model.train()
            row = {"step": step, "train_loss": round(loss.item(), 4), "validation_loss": round(validation, 4)}
            log.append(row | {"seconds": round(time.perf_counter() - started, 1)})
    model.eval()
    return log


def write_outputs(args: argparse.Namespace, recipe: Recipe, device: str) -> dict:
    """Run the whole recipe and write model, tokenizer, texts, log and figures below `args.output_dir`."""
    text = "\n\n".join(Path(path).read_text(encoding="utf-8") for path in args.text)
    torch.manual_seed(recipe.seed)
    splits = split_text(text, recipe)
    tokenizer = train_tokenizer(splits["train"], recipe)
    tokens = {name: tokenize(tokenizer, part) for name, part in splits.items()}
    model = build_model(recipe)
    log = train_model(model, tokens, recipe, device)
    model.to(torch.bfloat16)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": tokens["train"].numel(),
        "evaluation_tokens": tokens["evaluation"].numel(),
        "calibration_tokens": tokens["calibration"].numel(),
        "evaluation_perplexity": round(math.exp(mean_loss(model, tokens["evaluation"], recipe.seqlen)), 2),
        "unigram_perplexity": round(unigram_perplexity(tokens["train"], tokens["evaluation"], recipe.vocab_size), 2),
        "seqlen": recipe.seqlen,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
    }
    output = Path(args.output_dir)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    for name in ("calibration", "evaluation"):
        (output / f"{name}.txt").write_text(splits[name], encoding="utf-8")
    record = {"recipe": asdict(recipe), "figures": figures, "log": log}
    (output / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return figures


def main() -> None:
    """Parse the command line, train, print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="UTF-8 text files to train on")
    parser.add_argument("--output_dir", required=True, help="where model/, the two texts and training_log.json go")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=Recipe.batch_size, help="windows per step")
    parser.add_argument("--num_kv_heads", type=int, default=Recipe.num_kv_heads, help="key/value heads")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    missing = [path for path in args.text if not Path(path).is_file()]
    if missing:
        print(f"error: --text: no such file: {', '.join(missing)}", file=sys.stderr)
        raise SystemExit(2)
    recipe = Recipe(steps=args.steps, batch_size=args.batch_size, num_kv_heads=args.num_kv_heads, seed=args.seed)
    print(json.dumps(write_outputs(args, recipe, args.device), indent=1))


if __name__ == "__main__":
    main()
