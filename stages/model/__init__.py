"""gpt-oss itself: checkpoints, MXFP4, attention with sinks, experts, LoRA, and the live `Policy`."""
