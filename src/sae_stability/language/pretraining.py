"""Trains the two embedded language models, so that every number of the book can be had without a network.

They are small GPT-NeoX models of docstrings. Each becomes a Hugging Face folder that loads like any other, with a model
card that says how good it is beside counted baselines.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import read_metadata, save_tensors, write_json
from sae_stability.language.corpus import Contexts, Corpus, load, pack

VOCABULARY = 4096
CONTEXT = 256
BATCH = 8  # contexts a step: 2,048 tokens
RECORD = 50  # steps that a point of the loss curve averages
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    layers: int
    d_model: int
    heads: int
    epochs: float
    rate: float
    """Peak learning rate of AdamW; the cosine starts here and ends at zero."""
    seed: int = 0


RECIPES = {
    "docstrings-2l": Recipe(layers=2, d_model=128, heads=4, epochs=1, rate=4e-3),
    "docstrings-4l": Recipe(layers=4, d_model=256, heads=4, epochs=1.5, rate=2e-3),
}


def train_model(name: str, out: Path | None = None, epochs: float | None = None, checkpoint_seconds: float = 60) -> Path:
    """Train the embedded model `name` and write it to the folder `out`, by default models/NAME.

    An interrupted run goes on where it stopped.
    Raises `UserError` for a name that is not in `RECIPES`, a folder that is in use or a training of no steps.
    """
    if name not in RECIPES:
        raise UserError(f"train-model: there is no recipe {name}; take {' or '.join(RECIPES)}")
    out = out or places.model(name)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"train-model: {out} holds something already; give another folder with --out, or remove it")
    recipe = RECIPES[name] if epochs is None else replace(RECIPES[name], epochs=epochs)
    unfinished = out.with_name(f"{out.name}.unfinished")  # takes the place of `out` when all of it is there

    corpus = load("docstrings")
    read = corpus.train[corpus.moved :]  # what a split by document alone leaves for training
    tokenizer = train_tokenizer(read)
    train, held_out = (pack(documents, tokenizer, CONTEXT) for documents in (read, corpus.evaluation))
    if int(recipe.epochs * len(train.tokens)) < BATCH:
        raise UserError(f"train-model: {recipe.epochs:g} epochs are less than one step; raise --epochs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = unfinished / "checkpoint.safetensors"
    model, curve = _fit(recipe, train.tokens, device, checkpoint, corpus.sha256, checkpoint_seconds)

    report = evaluate(model, tokenizer, train, held_out, device)
    report |= {"tokens_seen": curve[-1]["tokens"], "train_tokens": int(train.is_text.sum()), "curve": curve}
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    described = {"name": name, "recipe": asdict(recipe), "corpus_sha256": corpus.sha256, **report}
    write_json(unfinished / "training.json", described)
    (unfinished / "README.md").write_text(_model_card(name, recipe, corpus, report), encoding="utf-8")
    checkpoint.unlink()
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
    return out


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `VOCABULARY` tokens; `<|endoftext|>` is both BOS and EOS, as in GPT-2."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT)


def evaluate(model, tokenizer, train: Contexts, held_out: Contexts, device: str) -> dict:
    """Loss on held-out documents in nats per token and bits per byte, beside unigram and bigram counts of the training split."""
    model.eval()
    nats, count = 0.0, 0
    with torch.inference_mode():
        for rows in tqdm(np.array_split(held_out.tokens, max(1, len(held_out.tokens) // 32)), "evaluation", disable=None):
            tokens = torch.from_numpy(rows).long().to(device)
            logits = model(tokens).logits[:, :-1].float()
            nats += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
            count += tokens[:, 1:].numel()
    text = tokenizer.decode(held_out.tokens[:, 1:].ravel().tolist(), skip_special_tokens=True)
    bytes_per_token = len(text.encode()) / count
    losses = {"model": nats / count, **_counted_baselines(train.tokens, held_out.tokens)}
    bits = {key: value / math.log(2) / bytes_per_token for key, value in losses.items()}
    return {"nats_per_token": losses, "bits_per_byte": bits, "held_out_tokens": count}


def _fit(
    recipe: Recipe,
    tokens: Int[np.ndarray, "context position"],
    device: str,
    checkpoint: Path,
    corpus_sha256: str,
    every: float,
) -> tuple[GPTNeoXForCausalLM, list[dict]]:
    """AdamW with a short warm-up and a cosine to zero, in bf16 where the processor computes in it."""
    torch.manual_seed(recipe.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=recipe.d_model,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=4 * recipe.d_model,
            max_position_embeddings=2 * CONTEXT,
            use_parallel_residual=False,  # four layers in parallel pairs would be two deep
            bos_token_id=0,
            eos_token_id=0,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    steps = int(recipe.epochs * len(tokens)) // BATCH
    warmup = max(1, steps // 50)
    parameters = dict(model.named_parameters())

    run = {"recipe": asdict(recipe), "corpus_sha256": corpus_sha256}
    first, curve = _resume(checkpoint, parameters, optimizer, run)
    fast = device == "cuda" or _cpu_computes_bf16()
    saved, running = time.monotonic(), []
    bar = tqdm(range(first, steps), "train-model", initial=first, total=steps, unit="step", disable=None)
    for step in bar:
        rate = recipe.rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(tokens[_rows(step, len(tokens), recipe.seed)]).long().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            logits = model(batch).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        running.append(loss.item())
        if len(running) == RECORD or step == steps - 1:
            curve.append({"tokens": (step + 1) * BATCH * CONTEXT, "nats_per_token": sum(running) / len(running)})
            running = []
            bar.set_postfix(nats=f"{curve[-1]['nats_per_token']:.3f}")
            if time.monotonic() - saved > every or step == steps - 1:
                _save(checkpoint, parameters, optimizer, {**run, "step": step + 1, "curve": curve})
                saved = time.monotonic()
    return model, curve


def _rows(step: int, contexts: int, seed: int) -> Int[np.ndarray, "batch"]:
    """Which contexts step `step` sees: a fresh permutation each epoch, from `seed` and the step alone."""
    wanted = np.arange(step * BATCH, (step + 1) * BATCH)
    epochs = {int(epoch): np.random.default_rng([seed, int(epoch)]).permutation(contexts) for epoch in set(wanted // contexts)}
    return np.array([epochs[int(index // contexts)][index % contexts] for index in wanted])


def _save(checkpoint: Path, parameters: dict, optimizer, metadata: dict) -> None:
    moments = {
        f"{moment}/{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    weights = {f"weight/{name}": parameter for name, parameter in parameters.items()}
    save_tensors(checkpoint, {**weights, **moments}, metadata)


def _resume(checkpoint: Path, parameters: dict, optimizer, run: dict) -> tuple[int, list[dict]]:
    """Go back to the checkpoint, if there is one of this very recipe and corpus; give its step and the curve so far."""
    metadata = read_metadata(checkpoint) if checkpoint.exists() else {}
    if {key: metadata.get(key) for key in run} != run:
        return 0, []
    state = load_file(checkpoint)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[f"weight/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(metadata["step"]), device=parameter.device),
                "exp_avg": state[f"exp_avg/{name}"].to(parameter.device),
                "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(parameter.device),
            }
    return metadata["step"], metadata["curve"]


def _cpu_computes_bf16() -> bool:
    """Without these instructions bf16 is emulated, and slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _counted_baselines(train: Int[np.ndarray, "a p"], held_out: Int[np.ndarray, "b p"]) -> dict[str, float]:
    """Cross-entropy of counts: add-one unigrams, and bigrams smoothed towards them (Witten-Bell)."""
    unigram = (np.bincount(train[:, 1:].ravel(), minlength=VOCABULARY) + 1.0) / (train[:, 1:].size + VOCABULARY)
    pairs = train[:, :-1].astype(np.int64) * VOCABULARY + train[:, 1:]
    bigram = np.bincount(pairs.ravel(), minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY)
    seen, kinds = bigram.sum(axis=1), (bigram > 0).sum(axis=1)
    before, after = held_out[:, :-1], held_out[:, 1:]
    mixed = (bigram[before, after] + kinds[before] * unigram[after]) / np.maximum(seen[before] + kinds[before], 1)
    likelihood = np.where(seen[before] > 0, mixed, unigram[after])
    return {"bigram": float(-np.log(likelihood).mean()), "unigram": float(-np.log(unigram[after]).mean())}


def _model_card(name: str, recipe: Recipe, corpus: Corpus, report: dict) -> str:
    nats, bits = report["nats_per_token"], report["bits_per_byte"]
    rows = "\n".join(f"| {key} | {nats[key]:.3f} | {bits[key]:.3f} |" for key in ("model", "bigram", "unigram"))
    curve = [*report["curve"][: -1 : max(1, len(report["curve"]) // 12)], report["curve"][-1]]
    points = "\n".join(f"| {point['tokens']:,} | {point['nats_per_token']:.3f} |" for point in curve)
    return f"""---
library_name: transformers
license: mit
language: en
---
# {name}

A GPT-NeoX language model of {recipe.layers} layers and d_model {recipe.d_model}, trained on the docstrings of scientific Python
packages. It exists so that a study of sparse autoencoders runs without a network; it is no use for anything else.

`sae-stability train-model {name}` writes this folder, this card included.

- Corpus: {len(corpus.train) - corpus.moved:,} training and {len(corpus.evaluation):,} held-out docstrings without near-duplicates,
  SHA-256 `{corpus.sha256}`
- Vocabulary: {VOCABULARY:,} byte-level BPE tokens; contexts of {CONTEXT} tokens that begin with `{END_OF_TEXT}`
- Training: {report["tokens_seen"]:,} tokens ({recipe.epochs:g} passes), AdamW, peak rate {recipe.rate:g}, cosine to zero,
  seed {recipe.seed}

Loss on {report["held_out_tokens"]:,} held-out tokens; the baselines are counted on the training documents:

| | nats per token | bits per byte |
| --- | --- | --- |
{rows}

Training loss (means of 50 steps):

| tokens | nats per token |
| --- | --- |
{points}
"""
