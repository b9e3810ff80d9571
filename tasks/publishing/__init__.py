"""Sealing a finished run, and which run is the published one."""
