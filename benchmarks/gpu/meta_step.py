"""Seconds and kernels of a meta-step on a GPU, and how near each setting comes to the ceilings of the device.

    python benchmarks gpu --cases A A15 B C --precision tf32 bf16 --out runs/gpu
    python benchmarks gpu --device cpu --small --precision fp32 bf16 --out runs/gpu-try

First each setting's float64 meta-gradient is compared with the plain loop's. Three ceilings are measured on the device:
in each precision that is asked for, the rates of a forward convolution of the case's main shape at a large batch and of
a large matrix product; and the rate of copying a large tensor.

conv %, matmul %: the floating-point operations of the plain loop, for every setting, per second, of the first two.
copy %: the bytes that the setting's own operations read and write, per second, of the third. Each operation counts
alone, so bytes that stay in a cache count too.

"batched" runs the convolutions of all tasks as one grouped convolution, the only form that the engine has: a loop of
convolutions, and one compiled function under vmap, are left out. "graphs" are CUDA graphs.

On the CPU, operations are counted in place of kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rivals.cases import CASES, Case, small
from rivals.contenders import REFERENCE, SETTINGS, Contender
from speed.arguments import parsed, parser_of
from speed.machine import environment, use_threads
from speed.measure import agreement, interleaved, not_run, seconds_of, synchronize
from speed.processes import Record

USUAL = tuple(
    f"{name}{how}" for name in (REFERENCE, "metawrap functional", "metawrap batched") for how in ("", " graphs")
)
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def set_precision(name: str) -> None:
    """Allows or forbids tf32 for float32 products; bf16 comes from autocast."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    # The shapes repeat, so a search for the fastest algorithm pays.
    torch.backends.cudnn.benchmark = True


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """The context of a meta-step at this precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else nullcontext()


class AtPrecision:
    """A contender whose steps run at a precision."""

    def __init__(self, contender: Contender, precision: str, device: str) -> None:
        self.contender, self.context = contender, autocast(precision, device)

    def step(self) -> None:
        """One outer update."""
        with self.context:
            self.contender.step()

    def gradients(self) -> dict[str, Tensor]:
        """The last step's meta-gradient."""
        return self.contender.gradients()


def convolution_ceiling(case: Case, device: str, precision: str, batch: int) -> Record:
    """FLOP/s of a forward convolution as in the second block, in the faster of both memory layouts."""
    side, width, dtype = case.side // 2, case.filters, PRECISIONS[precision]
    flops = 2 * batch * side**2 * width**2 * 9
    rates = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(batch, width, side, side, device=device, dtype=dtype).to(memory_format=layout)
        weight = torch.rand(width, width, 3, 3, device=device, dtype=dtype).to(memory_format=layout)
        rates.append(flops / _seconds(lambda x=x, w=weight: torch.conv2d(x, w, padding=1), device))
    return {"kind": "convolution ceiling", "case": asdict(case), "batch": batch, "flop_per_s": max(rates)}


def matmul_ceiling(device: str, precision: str, side: int) -> Record:
    """FLOP/s of a product of two square matrices."""
    one = torch.rand(side, side, device=device, dtype=PRECISIONS[precision])
    return {"kind": "matmul ceiling", "side": side, "flop_per_s": 2 * side**3 / _seconds(lambda: one @ one, device)}


def bandwidth_ceiling(device: str, megabytes: int) -> Record:
    """Bytes per second of a copy, read and written."""
    source = torch.rand(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    rate = 2 * megabytes * 2**20 / _seconds(lambda: target.copy_(source), device)
    return {"kind": "bandwidth ceiling", "megabytes": megabytes, "bytes_per_s": rate}


@torch.no_grad()
def _seconds(work: Callable[[], Any], device: str, repeats: int = 10) -> float:
    for _ in range(3):
        work()
    return statistics.median(seconds_of(work, device) for _ in range(repeats))


class Traffic(TorchDispatchMode):
    """Sums the bytes that operations read and write; views and new memory move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            touched = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, Tensor)]
            # An expanded tensor has more entries than bytes in memory.
            self.bytes += sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in touched)
        return output


def flops_of_step(case: Case, device: str) -> int:
    """Floating-point operations of one meta-step of the plain loop: convolutions and matrix products."""
    loop = SETTINGS[REFERENCE].build(case, torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        loop.step()
    return int(counter.get_total_flops())


def launches_of_step(contender: AtPrecision, device: str) -> int:
    """Kernels of one meta-step on a GPU; on the CPU, operations that call no other."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        contender.step()
        synchronize(device)
    events = trace.events() or []
    if cuda:
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)
    calls = [e for e in events if e.name.startswith("aten::")]
    return sum(not any(child.name.startswith("aten::") for child in e.cpu_children) for e in calls)


def measured(
    case: Case, names: Sequence[str], device: str, precision: str, repeats: int, ceilings: tuple[float, float, float]
) -> Iterator[Record]:
    """A record for each setting: interleaved seconds, launches, and percent of the ceilings."""
    flops = flops_of_step(case, device)
    running: dict[str, AtPrecision] = {}
    extra: dict[str, Record] = {}
    for name in names:
        setting = SETTINGS[name]
        try:
            running[name] = AtPrecision(setting.build(case, torch.float32, device), precision, device)
            for _ in range(setting.settles + 1):
                running[name].step()
            launches = launches_of_step(running[name], device)
            with Traffic() as traffic:
                running[name].step()
            # The replay of a graph shows no operations.
            moved = None if name.endswith(" graphs") else traffic.bytes
            extra[name] = {"kernels" if device.startswith("cuda") else "operations": launches, "bytes": moved}
        except Exception as error:
            running.pop(name, None)
            yield not_run(case, setting, error)
    seconds = interleaved(running, repeats, device, torch.get_num_threads())
    plain = statistics.median(seconds[REFERENCE]) if REFERENCE in seconds else None
    for name, found in seconds.items():
        median, moved = statistics.median(found), extra[name]["bytes"]
        yield {
            "kind": "gpu" if device.startswith("cuda") else "cpu",
            "case": asdict(case),
            "setting": name,
            "precision": precision,
            "median_s": median,
            "seconds": found,
            "ratio_to_plain": median / plain if plain else None,
            "flops_of_plain": flops,
            "convolution_percent": 100 * flops / median / ceilings[0],
            "matmul_percent": 100 * flops / median / ceilings[1],
            "bandwidth_percent": 100 * moved / median / ceilings[2] if moved is not None else None,
            **extra[name],
        }


def table_of(case: Case, precision: str, records: Sequence[Record], launches: str) -> Table:
    """One row for each setting that ran; the reasons of the others below."""
    title = f"{case}, {precision}"
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.add_column("setting", no_wrap=True)
    for column in ("median s", "ratio", launches, "conv %", "matmul %", "copy %"):
        table.add_column(column, justify="right")
    for record in records:
        if "median_s" in record:
            ratio, bandwidth = (record[key] for key in ("ratio_to_plain", "bandwidth_percent"))
            row = [f"{record['median_s']:.4f}", "" if ratio is None else f"{ratio:.3f}", f"{record[launches]}"]
            row += [f"{record[key]:.1f}" for key in ("convolution_percent", "matmul_percent")]
            table.add_row(record["setting"], *row, "" if bandwidth is None else f"{bandwidth:.1f}")
    left_out = [f"{r['kind']}: {r['setting']}: {r['reason']}" for r in records if "reason" in r]
    wrong = [
        f"wrong, not timed: {r['setting']}: {r['relative_error']:.0e}" for r in records if not r.get("agrees", True)
    ]
    table.caption = "\n".join(left_out + wrong) or None
    return table


def main() -> None:
    """Measures, prints, and writes gpu.jsonl."""
    args = _arguments()
    if args.threads:
        use_threads(args.threads, args.device)
    cuda, console = args.device.startswith("cuda"), Console(width=None if sys.stdout.isatty() else 120)
    everywhere = environment(args.device, "default") | {"cudnn_benchmark": True}
    with (args.out / "gpu.jsonl").open("w", encoding="utf-8") as file:

        def write(records: Sequence[Record], precision: str) -> None:
            file.writelines(json.dumps(everywhere | {"precision": precision} | r) + "\n" for r in records)
            file.flush()

        bandwidth = bandwidth_ceiling(args.device, 32 if args.small else 1024 if cuda else 256)
        console.print(f"copy: {bandwidth['bytes_per_s'] / 1e9:.1f} GB/s")
        write([bandwidth], "fp32")
        for name in args.cases:
            case = small(CASES[name]) if args.small else CASES[name]
            compared = list(agreement(case, args.only, args.device))
            write(compared, "fp64")
            right = [record["setting"] for record in compared if record.get("agrees")]
            for precision in args.precision:
                set_precision(precision)
                batch, side = (16, 64) if args.small else (4096, 8192) if cuda else (128, 1024)
                ceilings = [convolution_ceiling(case, args.device, precision, batch)]
                ceilings.append(matmul_ceiling(args.device, precision, side))
                rates = [ceiling["flop_per_s"] for ceiling in ceilings]
                console.print(f"{name}, {precision}: convolution, matmul: {[f'{r / 1e12:.3f}' for r in rates]} TFLOP/s")
                write(ceilings, precision)
                limits = (*rates, bandwidth["bytes_per_s"])
                found = list(measured(case, right, args.device, precision, args.repeats, limits))
                write(found, precision)
                console.print(table_of(case, precision, compared + found, "kernels" if cuda else "operations"))


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, USUAL)
    parser.add_argument(
        "--precision", nargs="+", default=["fp32"], choices=list(PRECISIONS), help="fp32, tf32, or bf16 by autocast"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice if left out")
    args = parsed(parser)
    args.cases = args.cases or list(CASES)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device. Pass --device cpu --small to try whether it runs.")
    return args
