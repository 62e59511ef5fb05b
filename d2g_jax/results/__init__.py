"""An evaluation's file: the metrics and their weights, results, tables of them. Nothing here draws or scores."""
