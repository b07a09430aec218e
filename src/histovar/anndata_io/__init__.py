"""The one place that reads and writes AnnData slots."""
