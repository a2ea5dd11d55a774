"""Training on accelerate, with timm's data, augmentation, optimizers, schedules, losses and averages."""
