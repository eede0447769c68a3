"""Train one of the two tiny checkpoints from scratch, in minutes on a CPU, from text that ships with Python.

    python examples/train_tiny.py --family qwen3_next
    python examples/train_tiny.py --family qwen3_5 --steps 300 --out my-model

The text is `pydoc_data.topics`, the language reference behind `help("with")`. The output folder is an ordinary
Transformers checkpoint, with its tokenizer, its held-out text and a model card. Parity on random weights proves little:
after training, decay rates, gates and convolutions are those of a model that has learned to remember and to forget.
"""

import argparse
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HELD_OUT_TOPICS = ("try", "with", "import")
PROMPT = "A class definition"
END = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 256  # tokens in a training window
BATCH = 8  # windows a step
LEARNING_RATE = 6e-3
WARM_UP = 30  # steps
WEIGHT_DECAY = 1.0  # a small text, read ten times: 0.1 memorises it and does worse on held-out text
STEPS = 600
SEED = 0
SAMPLE = 100  # tokens of generated text in the card
VERSIONS = {
    "Python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "tokenizers": tokenizers.__version__,
}

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,  # three linear, one full attention: the interleaving of both families
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Between them: two head ratios, DK == DV and DK != DV, grouped and separate projections, experts and a dense MLP.
FAMILIES = {
    "qwen3_next": COMMON
    | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_5": COMMON
    | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 24,
        "intermediate_size": 288,
    },
}
MODEL_TYPES = {"qwen3_next": "qwen3_next", "qwen3_5": "qwen3_5_text"}
CARD = Path(__file__).parent / "checkpoints" / "card_template.md"


def read_corpus() -> tuple[str, str]:
    """Return (training text, held-out text), with no paragraph in common.

    Topics quote each other at length, so each paragraph is kept once; the held-out topics choose first.
    """
    seen: set[str] = set()
    texts = {True: "", False: ""}
    for name in sorted(topics, key=lambda name: (name not in HELD_OUT_TOPICS, name)):
        paragraphs = [p for p in topics[name].strip().split("\n\n") if p not in seen]
        seen.update(paragraphs)
        texts[name in HELD_OUT_TOPICS] += "\n\n".join(paragraphs) + "\n\n\n"
    return texts[False], texts[True]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCABULARY` tokens; any text survives a round trip."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        model_max_length=COMMON["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a tokenizer that Transformers 4.57 reads too: it knows the class by the older of its two names only."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the tokens of a text of any length, [n] int64."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def build_model(family: str) -> PreTrainedModel:
    """Return the untrained float32 model of a family."""
    config = AutoConfig.for_model(MODEL_TYPES[family], **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):  # upstream's constant forgets within a token or two: start with longer memories
            step = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            parameter.data.copy_(step.expm1().log())  # the inverse of softplus
    return model


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the mean cross-entropy, in nats a token, over consecutive windows of `CONTEXT` tokens.

    tokens: [n] int64; the tail that fills no window is left out.
    """
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=rows, labels=rows).loss * len(rows) for rows in windows.split(BATCH)]
    return float(sum(losses) / len(windows))


def batches(tokens: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches [BATCH, CONTEXT] of windows that start anywhere in tokens [n]."""
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,))
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])


def optimiser_for(model: PreTrainedModel, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW (no decay on vectors: norms, decay rates) and its schedule: linear warm-up, then half a cosine."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))

    def factor(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def train(model: PreTrainedModel, tokens: Tensor, steps: int) -> None:
    """Train the model in place on tokens [n], showing loss, speed and the time left."""
    optimiser, schedule = optimiser_for(model, steps)
    has_experts = hasattr(model.config, "num_experts")
    balance = {"output_router_logits": True} if has_experts else {}  # adds upstream's load-balancing loss
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    model.train()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, loss=math.nan, speed=0.0)
        for rows in batches(tokens, steps):
            loss = model(input_ids=rows, labels=rows, **balance).loss
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item(), speed=(progress.tasks[0].speed or 0.0) * rows.numel())
    model.eval()


def describe_layers(config: PreTrainedConfig) -> str:
    """Say how many layers there are, and of which kind."""
    kinds = [kind.removesuffix("_attention") for kind in config.layer_types]
    return f"{len(kinds)}: {', '.join(kinds)}"


def describe_feed_forward(config: PreTrainedConfig) -> str:
    """Say what stands behind the attention of each layer."""
    if hasattr(config, "num_experts"):
        return f"{config.num_experts} experts, {config.num_experts_per_tok} a token, and a shared one"
    return f"dense, {config.intermediate_size} wide"


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return the prompt and its greedy continuation."""
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=SAMPLE, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def make(family: str, steps: int, out: Path) -> None:
    """Train a family for `steps` steps and write checkpoint, tokenizer, held-out text and card to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    text, held_out_text = read_corpus()
    tokenizer = train_tokenizer(text)
    tokens, held_out = encode(tokenizer, text), encode(tokenizer, held_out_text)
    model = build_model(family)
    before = held_out_loss(model, held_out)
    train(model, tokens, steps)

    model.to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    (out / "held_out.txt").write_text(held_out_text, encoding="utf-8", newline="\n")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # the card describes what users will load
    card = CARD.read_text(encoding="utf-8").format(
        family=family,
        parameters=model.num_parameters(),
        config=model.config,
        before=before,
        after=held_out_loss(model, held_out),
        layers=describe_layers(model.config),
        ratio=model.config.linear_num_value_heads // model.config.linear_num_key_heads,
        feed_forward=describe_feed_forward(model.config),
        steps=steps,
        batch=BATCH,
        context=CONTEXT,
        rate=LEARNING_RATE,
        decay=WEIGHT_DECAY,
        warm_up=WARM_UP,
        seed=SEED,
        versions=", ".join(f"{name} {version}" for name, version in VERSIONS.items()),
        train_tokens=len(tokens),
        held_out_tokens=len(held_out),
        held_out=", ".join(HELD_OUT_TOPICS),
        vocabulary=VOCABULARY,
        prompt=PROMPT,
        sample=greedy(model, tokenizer, PROMPT),
    )
    (out / "README.md").write_text(card, encoding="utf-8", newline="\n")
    print(card)


def positive(text: str) -> int:
    """Parse a number of steps."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument("--steps", type=positive, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="output folder (default: build/FAMILY-tiny, under the current one)")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()  # upstream says at each step that faster kernels could be installed
    transformers.logging.disable_progress_bar()
    make(options.family, options.steps, options.out or Path("build") / f"{options.family}-tiny")


if __name__ == "__main__":
    main()
