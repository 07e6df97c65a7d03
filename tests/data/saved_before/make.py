"""Write the files of this folder: models and checkpoints as version 0.1.0 saved them, and what it computed with them.

The files were made at commit fb47c32 (version 0.1.0) with torch 2.13.0 and transformers 5.24.0, by

    cd /tmp && PYTHONPATH=path/to/checkout/of/fb47c32 python path/to/make.py

They show that later versions read what earlier versions wrote (tests/test_saved_before.py). Don't make them again with
a later version. A format that is added later gets a folder and a script of its own.

| file or folder | what it holds |
|---|---|
| `layers.safetensors` | for each public layer: class and arguments (in the metadata), state dict, inputs, output |
| `causal_lm/`, `classifier/` | `LongVQForCausalLM` and `LongVQForSequenceClassification`, by `save_pretrained` |
| `replaced_llama/`, `replaced_bert/` | transformers models after `replace_attention`, by `save_pretrained` |
| `training/` | a training run that was killed after 4 of 8 steps, and `whole.csv`, the log of the whole run |
| `distillation/` | the checkpoint of a `distill_attention` that was killed, its data, and the curve of the whole run |

`expected.pt` in a folder holds the inputs and the outputs, all tensors in float32 or int64.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from longvq_layers import layers, models, replace_attention
from longvq_layers.models.huggingface import LongVQConfig, LongVQForCausalLM, LongVQForSequenceClassification
from longvq_layers.replace import distill_attention, load_replaced
from longvq_layers.train import Trainer, TrainSettings

FOLDER = Path(__file__).resolve().parent
VOCABULARY = 16
NEW_TOKENS = 8

WIDTH, LENGTH = 8, 16
SMALL = {"num_codes": 5, "window": 4}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
# name -> module of the class, class, arguments. All inputs that aren't in `inputs_of` are (1, LENGTH, WIDTH).
LAYERS: dict[str, tuple[str, str, dict]] = {
    "codebook": ("layers", "Codebook", {"num_heads": 2, "num_codes": 6, "dim": 4}),
    "codebook attention": ("layers", "CodebookAttention", {**HEADS, **SMALL}),
    "codebook attention, causal": ("layers", "CodebookAttention", {**HEADS, **SMALL, "causal": True}),
    "cross attention": ("layers", "CrossAttention", {"embed_dim": WIDTH, "num_heads": 4}),
    "damped EMA": ("layers", "DampedEMA", {"channels": WIDTH, "ndim": 4}),
    "dense attention": ("layers", "DenseAttention", {**HEADS, "window": 5}),
    "diagonal SSM": ("layers", "DiagonalSSM", {"channels": WIDTH, "d_state": 4}),
    "local attention": ("layers", "LocalAttention", {"embed_dim": WIDTH, "num_heads": 4, "window": 5}),
    "LongVQ": ("layers", "LongVQBlock", {"d_model": WIDTH, **SMALL, "d_state": 4, "causal": True, "d_ff": 8}),
    "LongVQ with EMA": (
        "layers",
        "LongVQBlock",
        {"d_model": WIDTH, **SMALL, "ssm": "ema", "ema_dim": 2, "norm_type": "rms", "glu": True},
    ),
    "LongVQ, dense": (
        "layers",
        "LongVQBlock",
        {"d_model": WIDTH, "num_codes": None, "d_state": 4, "norm": "post", "d_ff": 8},
    ),
    "Mega": ("layers", "MegaBlock", {"d_model": WIDTH, "ema_dim": 2, "chunk": 8, "causal": True, "d_ff": 8}),
    "Mega, whole": (
        "layers",
        "MegaBlock",
        {"d_model": WIDTH, "ema_dim": 2, "max_positions": 64, "norm_type": "rms", "d_ff": 8},
    ),
    "S4D": ("layers", "S4DLayer", {"d_model": WIDTH, "d_state": 4}),
    "S4D, causal": ("layers", "S4DLayer", {"d_model": WIDTH, "d_state": 4, "causal": True, "init": "inv"}),
    "SPADE": ("layers", "SPADEBlock", {"d_model": WIDTH, "num_heads": 4, "window": 5, "d_state": 4, "d_ff": 8}),
    "SPADE, stacked": (
        "layers",
        "SPADEBlock",
        {"d_model": WIDTH, "num_heads": 2, "combine": "stack", "window": 5, "d_state": 4, "causal": True},
    ),
    "VQ attention": ("layers", "VQAttention", {"embed_dim": WIDTH, "num_heads": 4, **SMALL}),
    "VQ attention, causal": (
        "layers",
        "VQAttention",
        {"embed_dim": WIDTH, "num_heads": 4, "num_kv_heads": 2, **SMALL, "causal": True, "local_keys": "exact"},
    ),
    "S4D block": ("models", "S4DBlock", {"d_model": WIDTH, "d_state": 4, "d_ff": 8}),
    "Transformer block": ("models", "TransformerBlock", {"d_model": WIDTH, "num_heads": 4, "d_ff": 8}),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str, seed: int = 0) -> list[Tensor]:
    """The arguments of one forward of a layer."""
    if name == "codebook":
        return [normal(1, 2, LENGTH, 4, seed=seed)]
    if name.startswith(("codebook attention", "dense attention")):
        return [normal(1, heads, LENGTH, 4, seed=seed + heads) for heads in (4, 2)] + [normal(1, 2, LENGTH, 4, seed=9)]
    if name == "cross attention":
        return [normal(1, LENGTH, WIDTH, seed=seed), normal(1, 15, WIDTH, seed=seed + 1)]
    return [normal(1, LENGTH, WIDTH, seed=seed)]


@torch.no_grad()
def make_layers() -> None:
    tensors, made_with = {}, {}
    for name, (module, kind, options) in LAYERS.items():
        layer = getattr({"layers": layers, "models": models}[module], kind)(**options)
        for parameter in layer.parameters():  # some start at 0 or 1, where a wrong name would not be noticed
            parameter.add_(0.05 * torch.randn_like(parameter))
        for seed in (1, 2):  # codebooks learn in training mode
            layer(*inputs_of(name, seed))
        output = layer.eval()(*inputs_of(name))
        tensors |= {f"{name}/state/{key}": value.contiguous() for key, value in layer.state_dict().items()}
        tensors |= {f"{name}/inputs/{place}": x for place, x in enumerate(inputs_of(name))}
        tensors[f"{name}/output"] = output.contiguous()
        made_with[name] = json.dumps({"module": module, "class": kind, "options": options})
    save_file(tensors, FOLDER / "layers.safetensors", made_with)


@torch.no_grad()
def save(model: nn.Module, folder: str, inputs: dict[str, Tensor], generate: bool = False) -> None:
    model.eval()
    expected = {"inputs": inputs, "output": model(**inputs)[0]}
    if generate:
        made = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        best = torch.stack(made.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-2, "another machine may choose other tokens"
        expected["generated"] = made.sequences
    model.save_pretrained(FOLDER / folder)
    torch.save(expected, FOLDER / folder / "expected.pt")


def wide(model: nn.Module) -> nn.Module:
    """The model with larger random weights, so that its attention prefers some keys and its logits some tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def make_huggingface_models() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes["block_options"] = {**SMALL, "d_state": 4, "d_ff": 8}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0  # padded on the left
    inputs = {"input_ids": tokens() * mask, "attention_mask": mask}
    lm = LongVQForCausalLM(LongVQConfig(**sizes, causal=True))
    classifier = LongVQForSequenceClassification(LongVQConfig(**{**sizes, "num_hidden_layers": 1}, num_labels=3))
    with torch.no_grad():
        for model in (lm, classifier):
            model.train()(input_ids=tokens(seed=1), labels=tokens(seed=1) if model is lm else torch.tensor([0, 1]))
    save(wide(lm), "causal_lm", inputs, generate=True)
    save(classifier, "classifier", inputs)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def make_replaced_models() -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 11:] = 0
    model = llama()
    replace_attention(model, num_codes=5, window=4, calibration=[tokens(seed=1), tokens(seed=2)])
    save(model, "replaced_llama", {"input_ids": tokens(1, 70)}, generate=True)  # longer than in training
    model = bert()
    replace_attention(model, num_codes=5, window=4, calibration=[tokens(seed=1), tokens(seed=2)])
    save(model, "replaced_bert", {"input_ids": tokens() * mask, "attention_mask": mask})


class Killed(Exception):
    pass


def killed(run: Callable[[Callable], object], after: int) -> None:
    """Call `run` with a function that raises at its call number `after`."""
    calls = []

    def kill(_: object) -> None:
        calls.append(None)
        if len(calls) == after:
            raise Killed

    try:
        run(kill)
    except Killed:
        return
    raise AssertionError("the run ended first")


def make_training() -> None:
    settings = TrainSettings(
        task="selective-copying",
        task_options={"length": 20, "memorise": 2, "vocab": 6},
        block_options={"num_codes": 8, "window": 4, "d_state": 4, "d_ff": 0},
        d_model=8,
        depth=1,
        batch_size=4,
        eval_every=2,
        eval_batches=2,
        checkpoint_every=2,
        warmup=2,
        lr=0.01,
        steps=8,
    )
    killed(Trainer(settings, FOLDER / "training").run, after=5)  # of the fifth step nothing is written
    with tempfile.TemporaryDirectory() as folder:
        Trainer(settings, folder).run()
        shutil.copy(Path(folder, "log.csv"), FOLDER / "training" / "whole.csv")


def make_distillation() -> None:
    """Of the saved Llama, from where it was saved."""
    data = [tokens(seed=seed) for seed in range(4)]
    options = {"steps": 12, "evaluate_every": 4, "patience": 20, "projections": True}
    folder = FOLDER / "distillation"
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint.pt").unlink(missing_ok=True)

    def run(progress: Callable | None = None, checkpoint: Path | None = None):
        model = llama()
        load_replaced(model, FOLDER / "replaced_llama")
        return distill_attention(model, data, **options, checkpoint=checkpoint, progress=progress), model

    killed(lambda kill: run(kill, folder / "checkpoint.pt"), after=3)
    report, model = run()
    curve = [(point.phase, point.step, point.error, point.train_error) for point in report.curve]
    expected = {"data": data, "options": options, "curve": curve, "before": report.before, "after": report.after}
    with torch.no_grad():
        expected |= {"inputs": {"input_ids": tokens()}, "output": model(tokens())[0]}
    torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for made in FOLDER.iterdir():
        if made.is_dir():
            shutil.rmtree(made)
    make_layers()
    make_huggingface_models()
    make_replaced_models()
    make_training()
    make_distillation()
