"""The two checkpoints that ship: small, loadable, really trained, and as their model cards say."""

import math
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = EXAMPLES / "checkpoints"
FAMILIES = ("qwen3_next", "qwen3_5")
MAX_BYTES = 2_000_000
WINDOW = 256  # tokens: how the card's loss was read
CARD_LOSS_TOLERANCE = 1e-3  # the card has four decimals; the rest is for float32 sums in another order


def card_loss(folder: Path, when: str) -> float:
    """Return the held-out loss "before" or "after" training that a model card records."""
    found = re.search(rf"held-out loss {when} training \| ([0-9.]+) ", (folder / "README.md").read_text("utf-8"))
    assert found, f"{folder / 'README.md'} records no held-out loss {when} training"
    return float(found[1])


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return CHECKPOINTS / f"{request.param}-tiny"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def windows(folder: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The held-out text in consecutive windows, [n, WINDOW] int64."""
    tokens = tokenizer((folder / "held_out.txt").read_text("utf-8"), verbose=False, return_tensors="pt")["input_ids"]
    return tokens[:, : tokens.shape[1] // WINDOW * WINDOW].view(-1, WINDOW)


def test_each_is_at_most_two_megabytes(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MAX_BYTES


def test_layers_interleave_as_in_the_family(model: PreTrainedModel) -> None:
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert model.config.linear_conv_kernel_dim == 4


def test_head_ratios_and_sizes_differ_between_the_two() -> None:
    configs = [AutoModelForCausalLM.from_pretrained(CHECKPOINTS / f"{f}-tiny").config for f in FAMILIES]
    assert [c.linear_num_value_heads // c.linear_num_key_heads for c in configs] == [2, 3]
    assert [c.linear_value_head_dim == c.linear_key_head_dim for c in configs] == [True, False]
    assert [getattr(c, "num_experts", 0) for c in configs] == [4, 0]


def test_the_card_loss_is_reproduced(folder: Path, model: PreTrainedModel, windows: torch.Tensor) -> None:
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert loss == pytest.approx(card_loss(folder, "after"), abs=CARD_LOSS_TOLERANCE)


def test_training_halved_the_held_out_loss(folder: Path, model: PreTrainedModel) -> None:
    before = card_loss(folder, "before")
    assert before == pytest.approx(math.log(model.config.vocab_size), abs=0.1)  # untrained: every token as likely
    assert card_loss(folder, "after") < 0.55 * before


def test_decays_depend_on_the_text(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """In every GDN layer some head keeps its state at one token and drops it at another: gates that were learned."""
    for decays in gate_decays(model, windows[:2]):
        low, high = decays.flatten(0, 1).quantile(torch.tensor([0.05, 0.95]), dim=0)  # [HV] each
        assert (high - low).max() > 0.4  # untrained: 0.26 at most


def gate_decays(model: PreTrainedModel, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the decay of each value head of each GDN layer on every token, [B, T, HV]."""
    seen: list[torch.Tensor] = []
    layers = [m for m in model.modules() if hasattr(m, "A_log")]
    projections = [getattr(m, "in_proj_ba", None) or m.in_proj_a for m in layers]
    hooks = [p.register_forward_hook(lambda _, __, out: seen.append(out)) for p in projections]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    for layer, out in zip(layers, seen, strict=True):
        grouped = out.shape[-1] == 2 * layer.num_v_heads  # groups of [b R | a R]: see the family's projections
        a = out.unflatten(-1, (layer.num_k_heads, 2, -1))[..., 1, :].flatten(-2) if grouped else out
        yield torch.exp(-layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias))


@pytest.mark.parametrize("text", ["", "def f(x):\n    return x", "héllo\t  wörld 漢字 😀\r\n\n", "<|endoftext|>"])
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_compresses_the_held_out_text(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    text = (folder / "held_out.txt").read_text("utf-8")
    tokens = tokenizer(text, verbose=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < len(tokenizer) == model.config.vocab_size
    assert len(tokens) < len(text) / 2


def test_greedy_text_is_made_of_words(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    known = set(re.findall("[a-z]{4,}", " ".join(topics.values()).lower()))
    for prompt in (CHECKPOINTS / "prompts.txt").read_text("utf-8").splitlines():
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = re.findall("[a-z]{4,}", tokenizer.decode(tokens).lower())
        assert len(words) >= 5, prompt
        assert sum(word in known for word in words) >= 0.8 * len(words), (prompt, words)


def run_training(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train_tiny.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_runs_end_to_end(family: str, tmp_path: Path) -> None:
    done = run_training("--family", family, "--steps", "2", "--out", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stdout
    assert card_loss(tmp_path / "model", "after") < card_loss(tmp_path / "model", "before")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 0


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_steps_must_be_a_positive_number(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "train_tiny.py"))["main"]
    with pytest.raises(SystemExit, match="2"):
        main(["--family", "qwen3_5", "--steps", steps])
    assert f"--steps: expected a positive number, got '{steps}'" in capsys.readouterr().err
