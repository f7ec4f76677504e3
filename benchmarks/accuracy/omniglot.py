"""The paper's Omniglot settings, from the shell: ways, shots, preset and seeds as flags; resumable; a JSON result.

The default is the full published schedule: 100 epochs of 500 meta-steps, 8 tasks each. --epochs, --iterations and
--batch make it shorter; the cosine schedule follows --epochs, the multi-step loss --msl-epochs.

    python benchmarks omniglot --data-root omniglot-py.zip --ways 5 --shots 1 --preset authors_code --seeds 0,1,2
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from metawrap.training import train, train_seeds
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import result_text


def main() -> None:
    """Reads the flags, trains every seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder or zip in torchvision's layout; downloaded if left out")
    parser.add_argument("--ways", type=int, default=20)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--method", default="maml++")
    parser.add_argument("--preset", default="authors_code", help="authors_code or paper")
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=500, help="meta-steps per epoch")
    parser.add_argument("--batch", type=int, default=8, help="tasks per meta-step")
    parser.add_argument("--msl-epochs", type=int, default=10)
    parser.add_argument("--seeds", default="0", help="one, or several with commas")
    parser.add_argument("--keep", type=int, default=5, help="best and newest checkpoints that stay")
    parser.add_argument("--ensemble", type=int, default=5, help="best checkpoints whose logits are averaged")
    parser.add_argument("--validation-tasks", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", default=None)
    parser.add_argument("--out", required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    settings = RunSettings(
        data="omniglot",
        data_root=args.data_root,
        ways=args.ways,
        shots=args.shots,
        method=args.method,
        preset=args.preset if args.method == "maml++" else None,
        filters=args.filters,
        epochs=args.epochs,
        iterations_per_epoch=args.iterations,
        tasks_per_batch=args.batch,
        options={"msl_epochs": args.msl_epochs} if args.method == "maml++" else {},
        validation_tasks=args.validation_tasks,
        keep=args.keep,
        ensemble=args.ensemble,
        device=args.device,
        engine=args.engine,
    )
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(seeds) == 1:
        print(result_text(train(replace(settings, seed=seeds[0]), args.out, args.resume)))
    else:
        print(result_text(train_seeds(settings, seeds, args.out, args.resume)))
