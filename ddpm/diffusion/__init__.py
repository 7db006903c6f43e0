"""The mathematics of diffusion: schedules make tables, a process noises by them, samplers walk
back.
"""
