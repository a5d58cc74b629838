"""What the long-running commands do: training runs and sweeps."""
