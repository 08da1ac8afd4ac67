"""Run the command line without the kernel that DeepSpeed would compile for processes of one machine; gloo does its work."""

import os

from finetune.cli.main import enter

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

enter()
