"""Train the embedded model: vae, evaluator, transformer, refine; then export and measure."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from sd35bench.nano import WEIGHTS
from sd35bench.nano.evaluator import save_evaluator
from sd35bench.nano.networks import assemble, export
from sd35bench.nano.train.card import load_pipeline, write_card, write_measurements
from sd35bench.nano.train.contrastive import train_evaluator
from sd35bench.nano.train.flow import REFINE, FlowModel, load_average
from sd35bench.nano.train.loop import Run
from sd35bench.nano.train.probe import train_and_probe
from sd35bench.nano.train.team import run_team
from sd35bench.nano.train.vae import load_vae, train_vae


@dataclass(frozen=True)
class Default:
    """What a training is run with where the command line does not say otherwise."""

    steps: int
    batch: int
    lr: float


DEFAULTS = {
    "vae": Default(3800, 16, 5e-4),
    "evaluator": Default(3500, 64, 2e-3),
    "refine": Default(770, 64, 6e-4),
    "transformer": Default(4300, 64, 1.2e-3),
}


def main() -> None:
    """Parse the command line, then train or export."""
    args = _parser().parse_args()
    if args.what == "export":
        print(f"{export(_pipeline(args), WEIGHTS)} bytes at {WEIGHTS}")
        return
    if args.what == "measure":
        write_card(load_pipeline(WEIGHTS), args.out / "transformer" / "log.txt")
        write_measurements(WEIGHTS, args.out / "measured.json")
        return
    default = DEFAULTS[args.what]
    run = Run(
        args.out / args.what,
        default.steps if args.steps is None else args.steps,
        default.batch if args.batch is None else args.batch,
        default.lr if args.lr is None else args.lr,
        args.seed,
        args.device,
    )
    if args.what == "vae":
        train_vae(run)
    elif args.what == "evaluator":
        save_evaluator(train_evaluator(run))
    elif args.what == "refine":
        start = args.out / "transformer" / "checkpoint.pt"
        vae = args.out / "vae"
        run_team(args.workers, train_and_probe, run, vae, args.renders, REFINE, start)
    else:
        run_team(args.workers, train_and_probe, run, args.out / "vae", args.renders)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sd35bench.nano.train", description=__doc__)
    parser.add_argument("what", choices=[*DEFAULTS, "export", "measure"])
    parser.add_argument("--out", type=Path, default=Path("results/nano-train"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument(
        "--renders", type=int, default=49152, help="transformer: size of the training set"
    )
    parser.add_argument("--workers", type=int, default=1, help="transformer: processes on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _pipeline(args: argparse.Namespace):
    model = FlowModel()
    last = args.out / "refine" / "checkpoint.pt"
    model.load_state_dict(
        load_average(last if last.exists() else args.out / "transformer" / "checkpoint.pt")
    )
    return assemble(load_vae(args.out / "vae"), model.transformer, model.text)


if __name__ == "__main__":
    main()
