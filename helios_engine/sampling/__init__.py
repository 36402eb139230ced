"""Pure functions that turn noise and velocities into latents: no network, no ranks."""
