"""Run one benchmark: `python -m longvq_layers.benchmarks NAME [--threads 2 …]`."""

import argparse

from longvq_layers.benchmarks import architectures, assign, attention, generation, gpu, llama, quality, ssm, step

BENCHMARKS = {
    "architectures": architectures,
    "assign": assign,
    "attention": attention,
    "generation": generation,
    "gpu": gpu,
    "llama": llama,
    "quality": quality,
    "ssm": ssm,
    "step": step,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longvq_layers.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        module.add_arguments(commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    args = parser.parse_args()
    BENCHMARKS[args.benchmark].run(args)


if __name__ == "__main__":
    main()
