"""Building and running a script: common flags, one-line errors with exit code 2."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

DATASET_HELP = (
    "demo (bundled), wikitext2, c4, ptb, alpaca (from the hub), or a .txt, .jsonl, .json or .parquet file, "
    "or a directory of them"
)


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message} (all flags: --help)\n")


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring as it is written."""
    return OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every script has."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--results", metavar="FILE", help="where the JSON record goes (default: results/, named after model and script)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything that is drawn (default: %(default)s)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run modelling code that comes with a checkpoint"
    )
    parser.add_argument("--verbose", action="store_true", help="log each step, and show full error traces")


def add_evaluated_flags(parser: argparse.ArgumentParser) -> None:
    """Which models a script that evaluates measures, and in which numbers."""
    flag = parser.add_argument
    flag("--model_name_or_path", required=True, help="directory or hub name of the model to measure")
    flag("--baseline", metavar="DIR", help="a model to measure beside it, usually the original")
    flag("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")


def run_script(
    parse: Callable[[list[str]], argparse.Namespace],
    main: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> None:
    """Parse the command line, run, and turn what a user can mend into one line and exit code 2."""
    args = parse(sys.argv[1:] if argv is None else argv)
    # Heavy imports come after parsing, so that --help and a mistyped flag answer at once.
    import torch

    from palu.core.errors import PaluError
    from utils.console import configure, print_error

    configure(args.verbose)
    # Ends like Ctrl-C, so that nothing half-written is left.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        main(args)
    except (torch.OutOfMemoryError, MemoryError) as error:
        print_error("out of memory; use fewer or shorter windows, a smaller --dtype, or another --device")
        raise SystemExit(2) from error
    except (PaluError, OSError) as error:
        if args.verbose:
            raise
        print_error(" ".join(str(error).split()))
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print_error("interrupted")
        raise SystemExit(130) from None


def resolve_device(name: str) -> str:
    """`auto` to the best device there is; refuse one that is not there.

    Raises:
        PaluError: naming the devices that can be used.
    """
    import torch

    from palu.core.errors import PaluError

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if count else "cpu"
    available = ["cpu"] + (["cuda"] + [f"cuda:{i}" for i in range(count)] if count else [])
    if name not in available:
        raise PaluError(f"device {name!r} is not available; use {', '.join(available)}")
    return "cuda:0" if name == "cuda" else name


def seed(text: str) -> int:
    """Argparse type of a seed: a whole number below 2**63."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**63 - 1")
    return value


def bit_list(text: str) -> list[int]:
    """Argparse type of comma-separated numbers of bits, each once."""
    try:
        bits = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers such as 8,4,2") from None
    return bits


def group_size(text: str) -> int | str:
    """Argparse type of a group size: a number of kv heads, or `all`."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of kv heads nor 'all'") from None
