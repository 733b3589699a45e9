"""Search the learning rate and the weight decay with Optuna, and stop unpromising trials early.

    pip install optuna
    OMP_NUM_THREADS=1 python examples/prune_with_optuna.py    # half a minute; one thread is faster for a narrow network
    python examples/prune_with_optuna.py --dataset cifar10 --full --epochs 24 --trials 50    # on a GPU

``fit`` calls ``on_epoch`` at the end of each epoch. Raising ``StopTraining`` there ends the run, and ``run.stopped``
records it. The search sees only validation images, which are held out of the training images. Each trial also has a
test accuracy. A search on the test images would make the best of them too high.
"""

import argparse
from typing import Any

from cifar_fast import Diverged, Recipe, StopTraining, fit, load_dataset
from cifar_fast.training.metrics import EpochRow

try:
    import optuna
except ImportError:
    raise SystemExit("this example needs Optuna: pip install optuna") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Search two constants of the recipe with Optuna.")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--images", type=int, default=2_000, help="training images; 0: all (default: 2,000)")
    parser.add_argument("--full", action="store_true", help="the published network, batch size and number of images")
    args = parser.parse_args()

    small: dict[str, Any] = {} if args.full else dict(batch_size=32, widths=(6, 12, 12, 24), train_subset=args.images)
    dataset = load_dataset(args.dataset)

    def objective(trial: optuna.Trial) -> float:
        peak = trial.suggest_float("peak learning rate", 0.05, 2.0, log=True)
        decay = trial.suggest_float("weight decay", 1e-5, 1e-2, log=True)
        recipe = Recipe(epochs=args.epochs, lr_values=(peak / 6, peak, 0.0), weight_decay=decay, **small)

        def on_epoch(row: EpochRow) -> None:
            trial.report(row.validation_accuracy, row.epoch)
            if trial.should_prune():
                raise StopTraining

        try:
            (run,) = fit(recipe, dataset, validation=0.1, on_epoch=on_epoch, log=None).runs
        except Diverged:  # costs no other trial
            raise optuna.TrialPruned from None
        if run.stopped:
            raise optuna.TrialPruned
        assert run.validation_accuracy is not None
        trial.set_user_attr("test accuracy", run.test_accuracy)
        return run.validation_accuracy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    study = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=args.trials)
    for trial in study.trials:
        peak, decay = trial.params["peak learning rate"], trial.params["weight decay"]
        outcome = "validation accuracy" if trial.state.name == "COMPLETE" else "stopped early at"
        value = "diverged" if trial.value is None else f"{outcome} {trial.value:.2f} %"
        print(f"trial {trial.number}: learning rate {peak:.3f}, weight decay {decay:.1e}: {value}")
    print(f"best: {study.best_params}, test accuracy {study.best_trial.user_attrs['test accuracy']:.2f} %")


if __name__ == "__main__":
    main()
