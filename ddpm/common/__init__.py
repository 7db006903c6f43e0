"""What every folder may use: tables of functions, random numbers, durations, pixels, files,
errors.
"""
