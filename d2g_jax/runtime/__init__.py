"""The ground that every job stands on: devices and processes, signals and locks, whole files, progress, errors.

Nothing here knows of networks, losses, records or settings.
"""
