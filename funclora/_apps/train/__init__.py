"""From a model folder and a data file to a tuned adapter: what `funclora train` runs."""
