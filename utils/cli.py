"""Building and running a script: common flags, one-line errors with exit code 2."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

DATASET_HELP = (
    "demo (bundled), wikitext2, c4, ptb, alpaca (from the hub), or a .txt, .jsonl, .json or .parquet file, "
    "or a directory of them"
)


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring as it is written and every default."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


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


def add_latent_flags(parser: argparse.ArgumentParser) -> None:
    """How the cache of a compressed model stores its latents; what is not given is as the checkpoint says."""
    flags = parser.add_argument_group("latents in the cache (compressed models)")
    flags.add_argument("--lt_bits", type=int, help="bits per latent: 2, 3, 4, 8, or 16 for no quantisation")
    flags.add_argument("--lt_value_bits", type=int, help="the same for values only (default: as --lt_bits)")
    flags.add_argument("--lt_group_size", type=int, help="latents that share a scale (default: a whole head group)")
    flags.add_argument("--lt_sym", action="store_true", help="symmetric codes, without zero points")
    flags.add_argument("--lt_clip_ratio", type=float, help="fraction of a group's range that the codes span")
    flags.add_argument("--lt_hadamard", action="store_true", help="turn latents by a Hadamard matrix after loading")


def latent_settings(args: argparse.Namespace, quantization: Any) -> Any:
    """The checkpoint's `QuantizationConfig` with the flags that were given."""
    import dataclasses

    given = {
        "key_bits": args.lt_bits,
        "value_bits": args.lt_bits if args.lt_value_bits is None else args.lt_value_bits,
        "group_size": args.lt_group_size,
        "symmetric": args.lt_sym or None,
        "clip_ratio": args.lt_clip_ratio,
    }
    return dataclasses.replace(quantization, **{name: value for name, value in given.items() if value is not None})


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


def group_size(text: str) -> int | str:
    """Argparse type of a group size: a number of kv heads, or `all`."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of kv heads nor 'all'") from None
