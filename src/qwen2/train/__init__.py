"""Training: step and loop, optimizers, schedules, checkpoints, and the stages made of them."""
