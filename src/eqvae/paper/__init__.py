"""The paper's tables and figures: expected figures, settings, plans, results."""
