"""The command line, derived from the commands' configuration dataclasses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import tyro
from safetensors import SafetensorError

from ard import (
    convert,
    costs,
    demo,
    diagnosis,
    distilling,
    encoding,
    evaluation,
    finetuning,
    recording,
    sampling,
    training,
)
from ard.checks import check_paths
from ard.shards import worker

_COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "demo": (demo.DemoConfig, demo.demo),
    "train-teacher": (training.TrainTeacherConfig, training.train_teacher),
    "record": (recording.RecordConfig, recording.record),
    "encode": (encoding.EncodeConfig, encoding.encode),
    "distill": (distilling.DistillConfig, distilling.distill),
    "finetune": (finetuning.FinetuneConfig, finetuning.finetune),
    "sample": (sampling.SampleConfig, sampling.run),
    "evaluate": (
        evaluation.EvaluateConfig,
        lambda config: evaluation.print_report(evaluation.evaluate(config)),
    ),
    "diagnose": (
        diagnosis.DiagnoseConfig,
        lambda config: diagnosis.print_report(diagnosis.diagnose(config)),
    ),
    "flops": (costs.FlopsConfig, costs.run),
    "convert": (convert.ConvertConfig, convert.convert),
    "train-classifier": (evaluation.TrainClassifierConfig, evaluation.train_classifier),
    "statistics": (evaluation.StatisticsConfig, evaluation.statistics),
}

# Commands that several processes run together, and those that go on where a call of them was stopped.
_SHARED = ("train-teacher", "record", "encode", "distill", "finetune", "train-classifier", "sample")
_CONTINUED = (*_SHARED, "demo")
_BROKEN_PIPE = 128 + 13  # the status of a program that SIGPIPE ends


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The configuration that a command line stands for."""
    choices = tuple(
        Annotated[config, tyro.conf.subcommand(name, prefix_name=False)]
        for name, (config, _) in _COMMANDS.items()
    )
    return tyro.cli(  # type: ignore[call-overload]
        Union[choices],  # noqa: UP007  made at run time
        prog="ard",
        description="AutoRegressive Distillation of diffusion transformers (arXiv 2504.11295).",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a mistake in what it was given is one line on stderr and exit status 1."""
    config = parse(arguments)
    name, function = next((n, f) for n, (c, f) in _COMMANDS.items() if c is type(config))
    try:
        check_paths(name, config)
        if name not in _SHARED and (world := worker()[1]) > 1:
            raise ValueError(f"WORLD_SIZE is {world}, accepted is 1: this command is one process's")
        function(config)
        sys.stdout.flush()
    except BrokenPipeError:  # `ard flops | head`
        # At its end Python would flush what nobody reads, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_BROKEN_PIPE) from None
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("ARD_TRACEBACK"):
            raise
        message = " ".join(str(error).split()).removeprefix(f"{name}: ")
        print(f"ard {name}: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        on = "; the same command goes on" if name in _CONTINUED else ""
        print(f"\nard {name}: interrupted{on}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
