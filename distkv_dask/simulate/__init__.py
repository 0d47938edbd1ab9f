"""A discrete-event simulator: the state machine that runs an engine, on modelled workers."""
