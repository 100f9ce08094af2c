"""What learning curves show: speed-up, intervals from seeds."""
