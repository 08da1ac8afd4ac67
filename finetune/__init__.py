"""Fine-tune YuLan-Mini from any of its published checkpoints, and export verified Llama-format models."""

import os

# Set before any library reads it: nothing is sent anywhere unless the user asks.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
