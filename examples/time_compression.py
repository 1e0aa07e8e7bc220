"""Time and memory of compressing a model of a given shape, with random weights and random tokens: no download.

Every stage is timed apart (Fisher information, input moments with factorisation, ..., save) with its peak GPU memory,
and the saved checkpoint is loaded again and asked for a few tokens.

    python examples/time_compression.py --model_shape llama-3-8b --output_dir /tmp/compressed
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import add_common_flags, new_parser, resolve_device, run_script
from utils.random_models import MODEL_SHAPES, stock_model


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model_shape", choices=MODEL_SHAPES, default="llama-3-8b")
    parser.add_argument("--output_dir", required=True, help="where the compressed checkpoint goes; must not exist")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint afterwards")
    parser.add_argument("--palu", action="store_true", help="Palu's own methods instead of the default ones")
    parser.add_argument("--param_ratio_target", type=float, default=0.5)
    parser.add_argument("--n_whiten_calib_samples", type=int, default=128)
    parser.add_argument("--calib_seqlen", type=int, default=2048)
    parser.add_argument("--n_fisher_calib_samples", type=int, default=64)
    parser.add_argument("--fisher_seqlen", type=int, default=1024)
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Build, compress, save, load; print the times."""
    import torch

    import palu
    from palu.calibrate.windows import CalibrationWindows
    from palu.checkpoint import load_model, prepare_output, save_checkpoint
    from palu.config import PALU_METHODS
    from utils.console import progress
    from utils.report import stage_table
    from utils.results import compression_rows, environment, results_path, write_results

    device = resolve_device(args.device)
    output = prepare_output(args.output_dir, overwrite=False)
    path = results_path(args.results, "time_compression", args.model_shape)
    torch.manual_seed(args.seed)
    model = stock_model(args.model_shape, torch.bfloat16, device)
    vocabulary = model.config.vocab_size
    windows = CalibrationWindows(
        torch.randint(vocabulary, (args.n_whiten_calib_samples, args.calib_seqlen)),
        torch.randint(vocabulary, (args.n_fisher_calib_samples, args.fisher_seqlen)),
    )
    methods = PALU_METHODS if args.palu else {}
    config = palu.CompressionConfig(param_ratio_target=args.param_ratio_target, seed=args.seed, **methods)
    compression = palu.compress(model, config=config, windows=windows, progress=progress)
    started = time.perf_counter()
    save_checkpoint(compression.model, None, output)
    compression.stages.append({"stage": "save", "seconds": time.perf_counter() - started})
    rows = compression_rows(args.model_shape, compression)
    results = {"rows": rows, "config": vars(args), "environment": environment(device, args.seed)}
    write_results(path, results)
    stage_table(results)
    ids = windows.fisher[:2, :64].to(device)
    loaded = load_model(output, device=device)
    with torch.no_grad():
        expected, got = compression.model(ids).logits.float(), loaded(ids).logits.float()
    saved, state = compression.model.state_dict(), loaded.state_dict()
    same = saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved)
    difference = ((got - expected).norm() / expected.norm()).item()
    print(f"{results['environment']['device']}; loaded tensors equal: {same}; logits differ by {difference:.1e}")
    print(loaded.generate(ids, max_new_tokens=4, do_sample=False)[:, -4:].tolist())
    if not args.keep:
        shutil.rmtree(output)


if __name__ == "__main__":
    run_script(parse, main)
