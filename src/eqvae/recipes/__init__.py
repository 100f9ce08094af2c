"""Every table and figure of the paper as typed functions that return complete configurations, and what runs them."""
