"""Run the command line as `python -m finetune`, which is what `accelerate launch -m finetune` calls."""

from finetune.cli.main import main

if __name__ == "__main__":
    main()
