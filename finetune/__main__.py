"""Run the command line for `python -m finetune`, which `accelerate launch -m finetune` calls too."""

from finetune.cli.main import enter

if __name__ == "__main__":
    enter()
