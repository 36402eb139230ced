"""The order of events: what happens per engine, per video, per chunk."""
