r"""Speed of training and generation, as a share of the machine's rate of matrix products.

    python benchmarks/speed.py            # half an hour on two cores
    python benchmarks/speed.py --smoke    # to see that it runs

Everything is measured in one run, as machines and their load differ: compare shares, not seconds. The limit is the best
rate of ``torch.matmul`` on square matrices; bf16 is left out where it is slower than fp32. The rate achieved is the
number of floating-point operations over the time they took, where a matrix product of (m, k) and (k, n) counts 2 m k n
and all else (softmax, norms, activations, random numbers) counts nothing. For one spot, with T tokens of which a token
of scale k attends to :math:`s_k` tokens and M memory vectors:

- condition and prior: :math:`F w + N (F H + H^2 + H (G + 1))`, with F features, N members with H hidden units and G
  genes (projecting the embeddings onto principal components, once a spot before all else, is left out);
- transformer, for each of L layers: :math:`T (2 w^2 + 2 w f + 2 w h M) + 2 w^2 n + 4 w^2 M + 2 w \sum_k n_k s_k`,
  with width w, h heads, feed-forward f and n tokens that others attend to;
- head: :math:`\sum_k n_k K_k (\min(w, D) + 2 c_k + q_k)` with the :math:`K_k` codes that scale k uses, :math:`D` their
  width, and :math:`q_k` what is expected of them: :math:`w + 2 c_k` where tokens are fed to later ones, else
  :math:`2 c_k`; the output layer, applied once for all spots to the codes where :math:`w < D`, is left out;

each counted twice (a product and a sum). A training step of stage 2 costs three times the transformer, output layer
(:math:`w D` a token) and condition (forward, and backward with respect to inputs and weights), for the loss
:math:`\sum_k 2 n_k K_k (D + 2 c_k)`, and the cost of the prior and of expected values as inputs. Of a wide finest scale
it learns a third of the tokens; only these are counted.

For the reference configuration, token order and training are measured in batches of 64 at most; larger take minutes.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from smoke import SMALL

import histovar as hv
from histovar._memory import keep_freed_memory
from histovar.model import Decoding, Histology, ModelConfig, TwoStageVARST
from histovar.training.stage1 import Stage1Module
from histovar.training.stage2_modules import MOST_GENES, Stage2Module
from histovar.training.trainer import TrainingOptions, genes_per_step

MOST_OF_REFERENCE = 64
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")


@contextmanager
def products_in(kind: str) -> Iterator[None]:
    """Allow products of 32-bit floats in TF32, or forbid them, on devices that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def best_time(work: Callable[[], Any], seconds: float, device: torch.device = CPU) -> float:
    """Shortest time of at least three runs, and of as many as fit; of the first if that takes three times as long.

    With no seconds, as in smoke mode, of a single run.
    """

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    times = [timed()]
    if times[0] > 3 * seconds:
        return times[0]
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed())
    return min(times)


def matrix_rate(kind: str, size: int, seconds: float, device: torch.device = CPU) -> float:
    """Rate of a square matrix product, FLOP/s."""
    a, b = torch.randn(2, size, size, device=device).to(TYPES[kind])
    with products_in(kind):
        return 2 * size**3 / best_time(lambda: a @ b, seconds, device)


def flops(model: TwoStageVARST, training: bool = False) -> float:
    """Floating-point operations for one spot; the module's docstring has the formula."""
    config, head = model.config, model.var_stage.head
    w, dim, n_layers = config.width, config.codebook_dim, config.n_layers
    if config.condition == "mlp":
        hidden = config.condition_hidden
        condition = config.embedding_dims[0] * hidden + hidden**2 + 2 * 64 + 64 * config.coordinate_dim
        features, n_memory = 0, 1
    else:
        features = model.var_stage.condition.n_features
        condition = features * w
        n_memory = len(config.source_dims) + config.coordinates + (config.n_covariates > 0)
    hidden, members = config.prior_hidden, config.n_members
    prior = members * (features * hidden + hidden**2 + hidden * (config.n_genes + 1))
    blocks = model.var_stage.transformer.blocks
    draws_genes = training and config.is_wide(len(config.scales) - 1)
    n_finest = genes_per_step(config.n_genes, MOST_GENES) if draws_genes else config.n_genes
    left_out = config.n_genes - n_finest
    n_tokens, scales = config.n_tokens - left_out, (*config.scales[:-1], n_finest)
    seen = sum((b.stop - b.start) * b.n_seen for b in blocks) - left_out * blocks[-1].n_seen
    if training and config.order == "token":
        seen = config.n_tokens**2  # masked, not skipped
    per_token = 2 * w**2 + 2 * w * config.feedforward + 2 * w * config.n_heads * n_memory
    n_keys = model.var_stage.transformer.n_keys
    transformer = n_layers * (n_tokens * per_token + 2 * w**2 * (n_keys + 2 * n_memory) + 2 * w * seen)
    narrow = head.tied and w < dim
    query = n_tokens * w * (dim if head.tied and (training or not narrow) else 0)
    assign = teacher = 0
    n_before = 0
    for k, (n, c) in enumerate(zip(scales, config.components, strict=True)):
        n_codes = len(head._used(k)[0]) if head.tied else config.codebook_size
        code_width = dim + 2 * c if head.tied else w
        logit_width = w + 2 * c if narrow else code_width
        feeds = n_before < config.n_feeding
        expected = (w if feeds else 0) + 2 * c
        if training:
            assign += n * n_codes * code_width * (2 if head.tied else 3)
            teacher += n * n_codes * (logit_width + expected) * (feeds and head.tied)
        else:
            assign += n * n_codes * (logit_width + expected)
        n_before += n
    return 2 * (assign + teacher + prior + (3 if training else 1) * (transformer + query + condition))


def trained(config: ModelConfig, n_genes: int) -> TwoStageVARST:
    """A model with realistic use of codes; its stage 2 is barely trained."""
    adata = hv.datasets.simulate(3, 150, n_genes + 40, embedding_dim=config.embedding_dims[0], random_state=0)
    hv.pp.gene_panel(adata, n_genes=n_genes)
    quick: dict[str, Any] = {"max_epochs": 2, "enable_progress_bar": False, "library_key": "section"}
    if config.style == "modern":
        return hv.tl.train(adata, use_rep="X_histology", config=config, **quick)
    # The reference is as slow untrained.
    model = TwoStageVARST(config)
    model.stage1.code_counts += 1
    return model.eval()


def spots(config: ModelConfig, n: int, device: torch.device = CPU) -> Histology:
    """Random inputs of the model, already aligned."""
    widths = config.aligned_dims if config.condition == "pca" else config.source_dims
    sources = tuple(torch.randn(n, width, device=device) for width in widths)
    place = torch.rand(n, 2 * config.coordinates, device=device)
    return Histology(sources, place, torch.zeros(n, 0, device=device), torch.zeros(n, device=device))


def peak_gb(device: torch.device = CPU) -> float:
    """Peak memory of the process so far, or of a CUDA device since the last call."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


class Table:
    """Measurements, printed as they come."""

    def __init__(self, limits: dict[str, float], device: torch.device = CPU) -> None:
        self.limits, self.device, self.rows = limits, device, list[dict[str, Any]]()

    def add(self, model: str, what: str, batch: int, seconds: float, per_spot: float, kind: str = "fp32") -> float:
        """Record the time of one batch, and return spots per second."""
        rate = per_spot * batch / seconds
        row = {
            "model": model,
            "what": what,
            "type": kind,
            "batch": batch,
            "spots/s": batch / seconds,
            "MFLOP/spot": per_spot / 1e6,
            "GFLOP/s": rate / 1e9,
            "share of limit": rate / self.limits[kind],
            "share of fp32 limit": rate / self.limits["fp32"],
            "peak GB": peak_gb(self.device),
        }
        self.rows.append(row)
        print(
            f"{model:>9} {what:<24} {kind} batch {batch:>5}: {row['spots/s']:9.1f} spots/s, "
            f"{row['GFLOP/s']:6.1f} GFLOP/s, {row['share of fp32 limit']:.0%} of the fp32 limit, "
            f"{row['share of limit']:.0%} of the type's, peak {row['peak GB']:.1f} GB",
            flush=True,
        )
        return float(row["spots/s"])


def generate_without_cache(model: TwoStageVARST, histology: Histology) -> torch.Tensor:
    """Greedy tokens in token order without caches: all earlier tokens are recomputed for each."""
    config = model.config
    tokens = torch.zeros(len(histology.novelty), config.n_tokens, dtype=torch.long)
    stage2 = model.var_stage
    memory = stage2.condition(histology)
    for block in stage2.transformer.blocks:
        embeddings = torch.zeros(len(tokens), config.n_feeding, config.width)
        if block.start:
            embeddings[:, : block.start] = stage2.head.embed(tokens[:, : block.start], model.stage1.quantizer.codebook)
        prefix = torch.arange(block.stop)
        hidden = stage2.transformer(embeddings, memory, prefix)[:, block.start :]
        groups = slice(block.start, block.stop)
        tokens[:, groups] = stage2.head.logits(hidden, block.scale, groups, None).argmax(-1)
    return tokens


def generation(table: Table, name: str, model: TwoStageVARST, arguments: argparse.Namespace) -> dict[str, float]:
    """Time expected, greedy and sampled decoding in both orders."""
    found: dict[str, float] = {}
    for order in ("scale", "token"):
        other = TwoStageVARST(model.config.replace(order=order))
        other.load_state_dict(model.state_dict())
        other.eval()
        other.var_stage.head.gate.fill_(1)  # with the gate shut, means would be the prior's, in any precision
        for batch in arguments.batches:
            if order == "token" and model.config.style == "reference" and batch > MOST_OF_REFERENCE:
                continue
            inputs = spots(model.config, batch)
            for mode in ("expected", "greedy", "sample"):
                if mode != "expected" and (batch != 64 or order == "token"):
                    continue
                seconds = best_time(lambda: other.predict(inputs, Decoding(mode)), arguments.seconds)  # noqa: B023
                found[f"{order} {mode} {batch}"] = table.add(
                    name, f"{mode}, {order} order", batch, seconds, flops(other)
                )
            if order == "scale" and other.config.n_members:
                without_tokens(name, other, inputs, found[f"scale expected {batch}"], arguments.seconds)
            if order == "scale" and "bf16" in table.limits:
                half = other.in_precision("bf16")
                seconds = best_time(lambda: half.predict(inputs), arguments.seconds)  # noqa: B023
                found[f"{order} bf16 {batch}"] = table.add(
                    name, f"expected, {order} order", batch, seconds, flops(other), "bf16"
                )
                apart = (
                    half.predict(inputs).expression - other.predict(inputs).expression
                ).abs() / model.stage1.scales.std
                print(f"{name}, batch {batch}: bf16 differs by {apart.mean():.4f} of the genes' standard deviation")
    return found


def without_tokens(name: str, model: TwoStageVARST, inputs: Histology, rate: float, seconds: float) -> None:
    """What is saved where tokens are not asked for and the gates are shut, as they mostly are."""
    gate, n_spots = model.var_stage.head.gate, len(inputs.novelty)
    gate.fill_(0)
    means = n_spots / best_time(lambda: model.predict(inputs, tokens=False, std=False), seconds, inputs.novelty.device)
    gate.fill_(1)
    print(f"{name}, batch {n_spots}: {means:.0f} spots/s without tokens, gates shut: {means / rate:.1f} times as many")


@torch.no_grad()
def caching(model: TwoStageVARST, n_spots: int) -> None:
    """Time token order with caches and without."""
    other = TwoStageVARST(model.config.replace(order="token"))
    other.load_state_dict(model.state_dict())
    other.eval()
    inputs = spots(model.config, n_spots)
    times, tokens = [], []
    for work in (
        lambda: other.predict(inputs, Decoding("greedy")).tokens,
        lambda: generate_without_cache(other, inputs),
    ):
        start = time.perf_counter()
        tokens.append(work())
        times.append(time.perf_counter() - start)
    print(
        f"reference, token order, {n_spots} spots: {times[1] / times[0]:.1f} times as fast as recomputing the prefix, "
        f"{(tokens[0] == tokens[1]).float().mean():.2%} of the tokens the same"
    )


def training_step(model: TwoStageVARST, batch: int, kind: str = "fp32") -> Callable[[], None]:
    """Training step of stage 2 on random spots, on the model's device; bf16 is mixed precision."""
    device = model.device
    model.set_training_stage(2)
    if model.var_stage.prior is not None:
        model.var_stage.prior.requires_grad_(False)
    module = Stage2Module(model, TrainingOptions(enable_progress_bar=False))
    module.watch = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    histology = spots(model.config, batch, device)
    tokens = torch.randint(0, model.config.codebook_size, (batch, model.config.n_tokens), device=device)
    means = torch.zeros(batch, model.config.n_genes, device=device)
    others = torch.zeros(0)  # which the prior's training takes

    def step() -> None:
        with products_in(kind):
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                loss = module.training_step((histology, tokens, others, others, others, others, means), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def training(table: Table, name: str, model: TwoStageVARST, arguments: argparse.Namespace) -> None:
    """Time a training step with each batch size."""
    for batch in arguments.batches[1:]:
        if model.config.style == "modern" or batch <= MOST_OF_REFERENCE:
            seconds = best_time(training_step(model, batch), arguments.seconds)
            table.add(name, "training step, stage 2", batch, seconds, flops(model, True))


def compiling(
    name: str, model: TwoStageVARST, batch: int, seconds: float, mode: str = "default"
) -> tuple[float, float]:
    """Speed-up of training and generation by compiling the transformer's layers."""

    def times() -> list[float]:
        found = []
        for work in (training_step(model, batch), torch.no_grad()(lambda: model.eval().predict(inputs))):
            work()  # which compiles
            found.append(best_time(work, seconds, model.device))
        return found

    inputs = spots(model.config, batch, model.device)
    before = times()
    for layer in model.var_stage.transformer.layers:
        layer.compile(mode=mode)
    training, generation = (old / new for old, new in zip(before, times(), strict=True))
    for layer in model.var_stage.transformer.layers:
        layer._compiled_call_impl = None
    print(
        f"{name}, batch {batch}, layers compiled ({mode}), speed-up: training {training:.2f}, "
        f"generation {generation:.2f}",
        flush=True,
    )
    return training, generation


def stage1_epoch(arguments: argparse.Namespace) -> None:
    """Time an epoch of stage 1 at the size of her2st: 13,159 spots and 200 genes."""
    n_spots, batch = (13_159, 64) if not arguments.smoke else (256, 64)
    model = TwoStageVARST(ModelConfig.default(200, **(SMALL if arguments.smoke else {})))
    module = Stage1Module(model, TrainingOptions(enable_progress_bar=False))
    module.watch = lambda *_, **__: None  # type: ignore[method-assign]
    expression = torch.randn(n_spots, 200)
    model.stage1.start_codebook(expression[:4096])
    model.set_training_stage(1)
    optimizer = torch.optim.AdamW(module.parameters())
    start = time.perf_counter()
    for chunk in expression.split(batch):
        loss = module.training_step((chunk,), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"stage 1: an epoch of {n_spots:,} spots x 200 genes in {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["default", "reference"], help="configurations")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 512], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=3.0, help="shortest time of each measurement")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=None, help="CSV file")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which needs a C++ compiler")
    parser.add_argument("--smoke", action="store_true", help="small models, one repetition")
    arguments = parser.parse_args()
    logging.getLogger("histovar").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as prediction and training do
    if arguments.smoke:
        arguments.batches, arguments.seconds = [1, 8], 0.0
    size = 256 if arguments.smoke else 2048
    limits = {kind: matrix_rate(kind, size, arguments.seconds) for kind in ("fp32", "bf16")}
    print(", ".join(f"{kind} limit {rate / 1e9:.1f} GFLOP/s" for kind, rate in limits.items()))
    if limits["bf16"] < limits["fp32"]:
        print("this machine has no arithmetic in bf16, which is left out")
        del limits["bf16"]
    table, small = Table(limits), SMALL if arguments.smoke else {}
    for name in arguments.models:
        if name == "default":
            n_genes, width = (40, 64) if arguments.smoke else (200, 1024)
            model = trained(ModelConfig.default(n_genes, width, **small), n_genes)
        else:
            cut = {"n_layers": 1, "codebook_size": 256} if arguments.smoke else {}
            model = trained(ModelConfig.reference(**cut), 200)
        with torch.no_grad():
            found = generation(table, name, model, arguments)
        for batch in arguments.batches[1:]:
            if f"token expected {batch}" in found:
                ratio = found[f"scale expected {batch}"] / found[f"token expected {batch}"]
                print(f"{name}, batch {batch}: scale order is {ratio:.1f} times as fast as token order")
            if f"scale bf16 {batch}" in found:
                ratio = found[f"scale bf16 {batch}"] / found[f"scale expected {batch}"]
                print(f"{name}, batch {batch}: bf16 is {ratio:.2f} times as fast as fp32")
        training(table, name, model, arguments)
        if arguments.compile:
            compiling(name, model, arguments.batches[1], arguments.seconds)
        if name == "reference":
            caching(model.eval(), 1 if arguments.smoke else 16)
    stage1_epoch(arguments)
    if arguments.out:
        pd.DataFrame(table.rows).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
