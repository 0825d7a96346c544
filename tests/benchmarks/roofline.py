"""How much of a GPU the model uses: predictions beside what PCIe and the arithmetic units allow, and training steps.

    python tests/benchmarks/roofline.py [--members 1] [--most 1048576]
    python tests/benchmarks/roofline.py --rehearse      # the same code on a CPU, in tiny sizes; its figures mean nothing

Bandwidth is that of a copy between pinned memory and the device, either way, the peaks are those of one large product of matrices in
float32 as torch is set up (predictions) and bfloat16 (training), all measured here. Bytes are the values in, float32, and mean and
deviation out; FLOPs are what torch.utils.flop_counter counts, which is products of matrices alone.

Prints, per batch size, doubled up to --most or until the memory is full: records a second of `imputing.predict`, which takes and
returns numpy arrays, and of the model alone over tensors on the device, each with its share of the roofline, the least of the three
limits; then seconds and TFLOP/s of `Training.step`, which runs in bfloat16 on a GPU, as it is and under torch.compile. Data are random
records of 64 labs, 128 codes and a 64-d embedding (see workload.py), weights untrained.

NOT YET RUN ON A GPU: written where there is none, only rehearsed.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workload import COHORT, make_model, records

from mmimpute import registry
from mmimpute.data.arrow import decode, flat
from mmimpute.data.tensors import to_model
from mmimpute.imputing import predict
from mmimpute.spec import ImputeSettings
from mmimpute.training import OptimiserSettings, Training

DISTINCT = 16_384  # records made; larger batches hold them again
FIRST = 1024
REPEATS = 10  # under torch.compile the first ones may compile anew
STEPS = 20


class Limits(NamedTuple):
    """Bytes a second to and from the device, and FLOPs a second by type."""

    to: float
    back: float
    float32: float
    bfloat16: float


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of some runs after two first ones."""
    found = []
    for _ in range(2 + REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[2:])


def limits(device: torch.device, size: int) -> Limits:
    """size: of the matrices; the copies are of as many bytes."""
    here = torch.empty(4 * size * size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(here, device=device)
    to = seconds(lambda: there.copy_(here, non_blocking=True), device)
    back = seconds(lambda: here.copy_(there, non_blocking=True), device)
    return Limits(len(here) / to, len(here) / back, peak(device, size, torch.float32), peak(device, size, torch.bfloat16))


def peak(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device)


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def batches(first: int, most: int) -> Iterator[int]:
    size = first
    while size <= most:
        yield size
        size *= 2


def repeated(x: np.ndarray, size: int) -> np.ndarray:
    return np.resize(x, (size, *x.shape[1:]))


def predictions(model: registry.Model, data: dict[str, np.ndarray], limit: Limits, most: int) -> Table:
    device, table = model.module.device, Table(title="Predictions")
    for column in ("batch", "predict, records/s", "of the roofline", "model alone, records/s", "of the roofline", "limited by"):
        table.add_column(column, justify="right")
    generator = torch.Generator(device)
    for size in batches(FIRST if device.type == "cuda" else 64, most):
        try:
            batch = {name: repeated(x, size) for name, x in data.items()}
            x, observed = to_model(flat(batch), model.widths, device)
            alone = lambda: model.module.predict(x, observed)  # noqa: B023, E731  called within this turn
            each = {"in": 4 * model.schema.width * size / limit.to, "out": 8 * model.schema.width * size / limit.back}
            each["arithmetic"] = flops(alone) / limit.float32
            found = [seconds(lambda: predict(model, batch, ImputeSettings(), generator), device), seconds(alone, device)]  # noqa: B023
        except torch.cuda.OutOfMemoryError:
            table.caption = f"{size:,} records do not fit"
            break
        # The copies are not the model's own, so only arithmetic limits it alone.
        shares = max(each.values()) / found[0], each["arithmetic"] / found[1]
        whole, own = ((f"{size / s:,.0f}", f"{share:.1%}") for s, share in zip(found, shares, strict=True))
        table.add_row(f"{size:,}", *whole, *own, max(each, key=each.get))
    return table


def steps(model: registry.Model, data: dict[str, np.ndarray], limit: Limits, most: int) -> Table:
    device, table = model.module.device, Table(title="Training steps, bfloat16" if model.module.device.type == "cuda" else "Training steps")
    for column in ("batch", "", "seconds a step", "records/s", "TFLOP/s", "of the measured peak"):
        table.add_column(column, justify="right")
    ways = {"as it is": lambda module: module, "torch.compile": lambda module: compiled(module, device)}
    for size in batches(FIRST if device.type == "cuda" else 64, most):
        x, observed = to_model(flat({name: repeated(v, size) for name, v in data.items()}), model.widths, "cpu")
        try:
            batch = [v.to(device).contiguous() for v in x], [o.to(device) for o in observed]
            for name, wrap in ways.items():
                took, work = step(registry.load(model.url).module.vae.to(device), wrap, batch)
                rate = work / took
                table.add_row(f"{size:,}", name, f"{took:.4f}", f"{size / took:,.0f}", f"{rate / 1e12:.2f}", f"{rate / limit.bfloat16:.1%}")
        except torch.cuda.OutOfMemoryError:
            table.caption = f"{size:,} records do not fit"
            break
    return table


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """In place: a wrapper would be taken for DDP's, or copied into the weight average.

    Frames that do not compile run as they are: `torch.randn` takes no generator, not even None, at a size that varies, and the
    number of records that lack something does.
    """
    torch._dynamo.config.suppress_errors = True
    torch._logging.set_logs(dynamo=logging.ERROR)
    module.compile(backend="inductor" if device.type == "cuda" else "eager")
    return module


def step(vae: nn.Module, wrap: Callable[[nn.Module], nn.Module], batch: tuple[list[Tensor], list[Tensor]]) -> tuple[float, int]:
    """Seconds of a step, and its FLOPs, counted on the module as it is: what a compiler merges is the same work."""
    vae.train()
    work = flops(lambda: Training(vae, OptimiserSettings(), STEPS).step(*batch))
    training = Training(vae, OptimiserSettings(), STEPS, wrap)
    return seconds(lambda: training.step(*batch), vae.hide_K.device), work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1, choices=(1, 5))
    parser.add_argument("--most", type=int, default=1 << 20, help="largest batch that is tried")
    parser.add_argument("--rehearse", action="store_true")
    given, console = parser.parse_args(), Console(width=140, highlight=False)
    if not torch.cuda.is_available() and not given.rehearse:
        sys.exit("no GPU here: nothing measured (--rehearse runs the code on the CPU, in tiny sizes)")
    device = torch.device("cpu" if given.rehearse else "cuda")
    limit, most = limits(device, 128 if given.rehearse else 8192), 128 if given.rehearse else given.most
    with tempfile.TemporaryDirectory() as scratch:
        model = registry.load(make_model(Path(scratch), members=given.members))
        model.module.to(device)
        sample = records(COHORT, min(most, DISTINCT), 1).combine_chunks()
        data = decode(sample, model.schema, "random")
        console.print("A REHEARSAL ON A CPU" if given.rehearse else torch.cuda.get_device_name())
        console.print(f"to the device {limit.to / 1e9:.1f} GB/s, back {limit.back / 1e9:.1f} GB/s; products of matrices", end=" ")
        console.print(f"{limit.float32 / 1e12:.2f} TFLOP/s in float32, {limit.bfloat16 / 1e12:.2f} in bfloat16")
        console.print(predictions(model, data, limit, most), steps(model, data, limit, most))


if __name__ == "__main__":
    main()
