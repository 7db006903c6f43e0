"""The mathematics of diffusion: schedules, forward process, targets, losses and samplers."""
