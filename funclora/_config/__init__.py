"""From a configuration and a model to the parameters that are adapted."""
