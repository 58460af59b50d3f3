"""What the commands take, and what they run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spartan.saving.tables import text_table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status (0 well, 1 failed, 2 wrong usage, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"spartan: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spartan", description="Train networks to a sparsity chosen beforehand.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=lambda options: _version(parser, options))
    commands = parser.add_subparsers(title="commands")
    info = commands.add_parser("info", help="what is installed, and which backend serves which operator here")
    info.set_defaults(run=lambda options: _info())
    bench = commands.add_parser("bench", help="check the operators on this machine and time them beside PyTorch's")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    bench.add_argument("--backend", help="time this backend instead of the automatic choice")
    bench.add_argument("--quick", action="store_true", help="small operands, a few seconds")
    bench.set_defaults(run=_bench)
    demo = commands.add_parser("demo", help="train two models on Fashion-MNIST, dense and sparse, and compare them")
    demo.add_argument("--quick", action="store_true", help="under a minute: fewer epochs, 6,000 training images")
    demo.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the four idx files (default: look for them)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("spartan-demo"),
        help="where results go (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and order of images (default: %(default)s)")
    demo.add_argument("--resume", action="store_true", help="go on from the checkpoint that Ctrl-C left in --out")
    demo.set_defaults(run=_demo)
    train = commands.add_parser("train", help="train what a YAML file describes; the same command goes on after a stop")
    train.add_argument("config", type=Path, metavar="CONFIG.yaml", help="see examples/README.md")
    train.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as steps=20 data.limit=512"
    )
    train.add_argument("--restart", action="store_true", help="begin anew, whatever the run's folder holds")
    train.set_defaults(run=_train)
    inspect = commands.add_parser("inspect", help="zeros, blocks and sizes of a saved model, tensor by tensor")
    inspect.add_argument("file", type=Path, metavar="FILE", help="folder of save_pretrained, or a safetensors file")
    inspect.set_defaults(run=_inspect)
    return parser


def _version(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from spartan_kernels import __version__

    if options.version:
        print(f"spartan {__version__}")
        return 0
    parser.print_help()
    return 2


def _bench(options: argparse.Namespace) -> int:
    import torch

    from spartan.cli.benchmark import DTYPES, Measured, measure, table

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} sees no CUDA device")
    found: list[Measured] = []
    for one in measure(device, DTYPES[options.dtype], options.backend, options.quick):
        print(f"{one.name}: {one.wrong or 'checked and timed'}", file=sys.stderr, flush=True)
        found.append(one)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{where}, {options.dtype}, backend {options.backend or 'auto'}, PyTorch {torch.__version__}"
    print(text_table(title, *table(found)))
    return int(any(one.wrong for one in found))


def _demo(options: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"the demo needs {error.name}: pip install 'spartan-kernels[demo]'") from error
    from spartan.demo.run import run_demo

    return run_demo(quick=options.quick, data=options.data, out=options.out, seed=options.seed, resume=options.resume)


def _train(options: argparse.Namespace) -> int:
    from spartan.training.config import read
    from spartan.training.trainer import train

    try:
        config = read(options.config, options.set)
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    return 0 if train(config, options.restart) else 130


def _inspect(options: argparse.Namespace) -> int:
    from spartan.saving.inspection import inspect_file

    print(inspect_file(options.file))
    return 0


def _info() -> int:
    from spartan_kernels import info

    facts = info()
    print(text_table("Installation", ("what", "value"), _general_rows(facts)))
    (headings, *rows), reasons = _backend_rows(facts)
    print(text_table("Which backend serves which operator", headings, rows, reasons))
    return 0


def _general_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("spartan-kernels", facts["version"]), ("torch", facts["torch"])]
    rows += [("python", sys.version.split()[0]), ("devices", ", ".join(facts["devices"]))]
    native = {key: value for key, value in facts["native"].items() if value is not None}
    return rows + [(f"native: {key.replace('_', ' ')}", str(value)) for key, value in native.items()]


def _backend_rows(facts: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Make a heading and a row per operator and device; what is not served has the number of its reason."""
    numbers: dict[str, int] = {}
    rows: list[tuple[str, ...]] = []
    names: tuple[str, ...] = ()
    for operator, devices in facts["operators"].items():
        for device, backends in devices.items():
            names = tuple(name for name in backends if name != "auto")
            cells = []
            for name in names:
                if (reason := backends[name]) is None:
                    cells.append("auto" if name == backends["auto"] else "yes")
                else:
                    shared = reason.replace(operator, "such operator")
                    cells.append(f"({numbers.setdefault(shared, len(numbers) + 1)})")
            rows.append((operator, device, *cells))
    reasons = [f"({number}) {reason}" for reason, number in numbers.items()]
    return [("operator", "device", *names), *rows], reasons
